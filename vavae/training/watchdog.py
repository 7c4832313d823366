"""End of a rank that makes no progress, so that its runner can start the ranks again."""

import faulthandler
import sys
from types import TracebackType


class Watchdog:
    """Timer that ends the process, with the stacks of all threads on standard error, when it is not fed in time.

    It waits outside Python, so it also finds a process that holds the interpreter's lock for ever, as in a collective
    whose other ranks are gone. One per process.

    Args:
        seconds: that may pass between two feedings; none switches it off.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds

    def __enter__(self) -> "Watchdog":
        return self

    def feed(self) -> None:
        """Report progress: restart the timer."""
        if self._seconds is not None:
            assert sys.__stderr__ is not None, "a training has a standard error"
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()
