"""Checkpoints are written to storage by a thread of their own."""

from collections.abc import Callable
from threading import Event, Thread

from vavae.errors import UserError, one_line
from vavae.training.checkpoints.lease import SupersededError


class BackgroundWrite:
    """A pending write of a checkpoint, in a daemon thread that never keeps the process alive.

    Args:
        work: done by the thread; the event that it is given asks it to wait for no other rank.
    """

    def __init__(self, work: Callable[[Event], None]) -> None:
        self._abandoned = Event()
        self._error: UserError | None = UserError("the thread that writes it died")
        self._thread = Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Event], None]) -> None:
        try:
            work(self._abandoned)
        except SupersededError as error:
            self._error = error
        except (OSError, UserError) as error:
            # Errors of stores' clients cannot be sent to other ranks.
            self._error = UserError(one_line(error) if isinstance(error, OSError) else str(error))
        else:
            self._error = None

    def abandon(self) -> None:
        """Ask the thread to wait for no other rank."""
        self._abandoned.set()

    def result(self) -> UserError | None:
        """Wait for the end; returns the error, if there was one."""
        self._thread.join()
        return self._error
