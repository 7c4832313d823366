"""Errors that a user can mend, as opposed to the assertions that guard our own invariants."""


class UserError(ValueError):
    """An error in what the user gave: one line with the value, the place and the remedy.

    Every command catches it at the top, prints the line on standard error and exits with status 2.
    """


class CommonError(UserError):
    """A user error that every rank of a training raises at the same step, so that none waits for another."""
