"""Errors that a user can mend, as opposed to the assertions that guard our own invariants."""


class UserError(ValueError):
    """Something in the user's hands is wrong: one line with the value, the place and the remedy.

    Every command catches it at the top, prints the line on standard error and exits with status 2.
    """


class CommonError(UserError):
    """One that every rank of a training raises at the same step, so that none waits for another."""
