"""A checkpoint on its way to storage, in a thread of its own."""

from collections.abc import Callable
from threading import Event, Thread

from vavae.errors import UserError
from vavae.training.checkpoints.lease import SupersededError


class BackgroundWrite:
    """A checkpoint on its way to storage, in a thread that never keeps the process alive.

    Args:
        work: what the thread does; the event that it is given asks it to wait for nobody.
    """

    def __init__(self, work: Callable[[Event], None]) -> None:
        self._left = Event()
        self._error: UserError | None = UserError("the thread that writes it died")
        self._thread = Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Event], None]) -> None:
        try:
            work(self._left)
        except SupersededError as error:
            self._error = error
        except (OSError, UserError) as error:
            self._error = UserError(str(error))  # those of stores' clients do not survive the way to other ranks
        else:
            self._error = None

    def leave(self) -> None:
        """Ask the thread to wait for nobody."""
        self._left.set()

    def result(self) -> UserError | None:
        """Wait for the end; the error, if there was one."""
        self._thread.join()
        return self._error
