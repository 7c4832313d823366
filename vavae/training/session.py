"""Interface of the training loop to its runner: Ray, torchrun, a test."""

import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from vavae.progress import Progress, ProgressLines
from vavae.runs.events import Event, EventLog


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
class SignaledSession(LocalSession):
    """Session in this process that SIGINT and SIGTERM ask to stop; a second one interrupts at once."""

    _stop: bool = field(default=False, init=False)

    def stop_requested(self) -> bool:
        """See `Session.stop_requested`."""
        return self._stop

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle the signals until the block ends; in the main thread."""
        before = {number: signal.signal(number, self._request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.default_int_handler)  # first, as a second one may come at once
        self._stop = True
        print("stopping after a checkpoint; press Ctrl-C again to exit now", file=sys.stderr, flush=True)
