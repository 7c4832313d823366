"""A tracker's client in a thread of its own, which neither delays a job nor ends it."""

import logging
import queue
import threading
from collections.abc import Callable, Mapping

from PIL.Image import Image

from vavae.tracking.tracker import TrackerRun

logger = logging.getLogger(__name__)

_QUEUED = 10_000
"""Rows and pictures that wait for a slow tracker; further ones are dropped."""
_CLOSE_SECONDS = 60.0
"""Time that the end of a job waits for what is queued."""

_Call = Callable[[TrackerRun], None]


class BackgroundTracker:
    """A `Tracker` that passes everything on in a thread, where errors of the package become one warning.

    Rows that the tracker has already, from before a rollback or an interruption, are not shown again: it keeps the
    first ones.

    Args:
        name: name of the tracker.
        open_run: opens the job in the tracker's client.
        close_seconds: time that closing waits for what is queued.
    """

    def __init__(self, name: str, open_run: Callable[[], TrackerRun], close_seconds: float = _CLOSE_SECONDS) -> None:
        self._name, self._open_run, self._close_seconds = name, open_run, close_seconds
        self._calls: queue.Queue[_Call | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name=f"tracking-{name}", daemon=True)
        self._newest = self._repeated_until = -1
        self._failed = self._warned = False

    def rewind(self, images_seen: int) -> None:
        """See `Tracker.rewind`."""
        self._repeated_until = self._newest
        if self._thread.ident is None:
            self._thread.start()

    def metrics(self, images_seen: int, row: Mapping[str, float]) -> None:
        """See `Tracker.metrics`."""
        row = dict(row)
        self._put(images_seen, lambda run: run.metrics(images_seen, row))

    def picture(self, images_seen: int, name: str, picture: Image) -> None:
        """See `Tracker.picture`."""
        self._put(images_seen, lambda run: run.picture(images_seen, name, picture))

    def flush(self) -> Callable[[], None]:
        """See `Tracker.flush`; the package sends by itself."""
        return lambda: None

    def close(self, failed: bool) -> None:
        """See `Tracker.close`; waits for what is queued, up to a limit."""
        if self._thread.ident is None:
            return
        self._calls.put(lambda run: run.finish(failed))
        self._calls.put(None)
        self._thread.join(self._close_seconds)
        if self._thread.is_alive():
            self._warn(f"not everything was sent within {self._close_seconds:g} seconds")

    def _put(self, images_seen: int, call: _Call) -> None:
        if images_seen <= self._repeated_until:
            return
        self._newest = max(self._newest, images_seen)
        if self._calls.qsize() >= _QUEUED:
            self._warn(f"it is slow, and {_QUEUED:,} rows wait for it")
        elif not self._failed:
            self._calls.put(lambda run: call(run) if images_seen > run.last_step else None)

    def _work(self) -> None:
        try:
            run = self._open_run()
        except BaseException as error:  # noqa: BLE001 - packages even end a process that they can't log in from
            self._failed = True
            self._warn(f"{type(error).__name__}: {error}")
            return
        while (call := self._calls.get()) is not None:
            try:
                call(run)
            except Exception as error:  # noqa: BLE001 - whatever a package raises, the job goes on
                self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            why = " ".join(why.split())
            logger.warning("tracking: %s does not get everything, and the job goes on: %s", self._name, why)
