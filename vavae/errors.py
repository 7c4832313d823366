"""Errors that a user can mend, as opposed to the assertions that guard our own invariants."""

import errno
import os

_REMEDIES = {
    errno.ENOSPC: "free some space there, or name another folder",
    errno.EDQUOT: "free some space there, or name another folder",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EACCES: "change its rights, or name another place",
    errno.EPERM: "change its rights, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
"""Ways out of what a machine refuses, by the number of the error."""


class UserError(ValueError):
    """An error in what the user gave: one line with the value, the place and the remedy.

    Every command catches it at the top, prints the line on standard error and exits with status 2.
    """


class CommonError(UserError):
    """A user error that every rank of a training raises at the same step, so that none waits for another."""


def one_line(error: OSError) -> str:
    """Describe what a machine refuses in one line: the file, the reason, and the way out where there is one."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError) and error.strerror is None:
        reason = f"{reason}: no such file"
    place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{place}{reason}{f'; {remedy}' if remedy else ''}"
