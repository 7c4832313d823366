"""Interface of the training loop to its runner: Ray, torchrun, a test."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from vavae.progress import Progress, ProgressLines
from vavae.runs.events import Event, EventLog

_SAME_SIGNAL_SECONDS = 1.0


def this_process() -> str:
    """Describe this process for users."""
    return f"process {os.getpid()} on {socket.gethostname()}"


class Session(Protocol):
    """Runner of a training: shows its progress and asks it to stop."""

    @property
    def owner(self) -> str:
        """Name of the runner for users; the same for all its attempts at a training."""

    def progress(self, progress: Progress) -> None:
        """Show the progress; called by rank 0, cheap enough for every step."""

    def row(self, row: Mapping[str, float]) -> None:
        """Show a row of metrics. Called by every rank, with its own times and memory."""

    def event(self, event: Event) -> None:
        """Record an event; called by rank 0."""

    def checkpoint(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Note that a checkpoint is being saved. Called by every rank equally often; may wait for all of them."""

    def stop_requested(self) -> bool:
        """Return whether to save and stop. Called on every rank at every step; one yes is enough."""

    def save_check_due(self) -> bool:
        """Return whether it is time to call `must_save`. Called on every rank at every step; one yes is enough."""

    def must_save(self) -> bool:
        """Return whether a machine is about to be lost, so that a checkpoint is due. Called on every rank; may wait."""


@dataclass
class LocalSession:
    """Session in this process: progress goes to standard output, and nothing asks the training to stop."""

    events: EventLog | None = None
    """Log of the events; None drops them."""
    _lines: ProgressLines = field(default_factory=lambda: ProgressLines("train"), init=False)

    @property
    def owner(self) -> str:
        """See `Session.owner`."""
        return this_process()

    def progress(self, progress: Progress) -> None:
        """See `Session.progress`."""
        self._lines.show(progress)

    def row(self, row: Mapping[str, float]) -> None:
        """See `Session.row`."""

    def event(self, event: Event) -> None:
        """See `Session.event`."""
        if self.events is not None:
            self.events.add(event)

    def checkpoint(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """See `Session.checkpoint`."""

    def stop_requested(self) -> bool:
        """See `Session.stop_requested`."""
        return False

    def save_check_due(self) -> bool:
        """See `Session.save_check_due`."""
        return False

    def must_save(self) -> bool:
        """See `Session.must_save`."""
        return False


@dataclass
class StoppableSession(LocalSession):
    """Session in this process that can be asked to stop, as by `stop_on_signals`."""

    _stop: bool = field(default=False, init=False)

    def stop_requested(self) -> bool:
        """See `Session.stop_requested`."""
        return self._stop

    def request_stop(self) -> None:
        """Stop after the step that is being taken."""
        self._stop = True


@contextmanager
def stop_on_signals(request_stop: Callable[[], None]) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM in the block into a request to stop; a second one interrupts at once.

    One within a second of the first is the first: `timeout` and others send it to a process and then to its group. In
    threads other than the main one signals are left alone.
    """
    first: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            print("stopping after a checkpoint; press Ctrl-C again to exit now", file=sys.stderr, flush=True)
            request_stop()
        elif time.monotonic() - first > _SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
