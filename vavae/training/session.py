"""How the training loop speaks to whoever runs it: Ray, torchrun, a test."""

import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from vavae.progress import Progress, show
from vavae.runs.events import Event, EventLog


def this_process() -> str:
    """This process, in words."""
    return f"process {os.getpid()} on {socket.gethostname()}"


class Session(Protocol):
    """The runner's side of a training run."""

    @property
    def owner(self) -> str:
        """Who runs the training, in words; the same for all attempts that it makes."""

    def progress(self, progress: Progress) -> None:
        """Show how far the run is; called by rank 0, cheap enough for every step."""

    def row(self, row: Mapping[str, float]) -> None:
        """Show a row of metrics. Called by every rank, with its own times and memory."""

    def event(self, event: Event) -> None:
        """Remember what happened; called by rank 0."""

    def checkpoint(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """A checkpoint is on its way. Called by every rank equally often; may wait for all of them."""

    def stop_requested(self) -> bool:
        """Whether the run should save and leave. Asked on every rank at every step; one yes is enough."""

    def listens(self) -> bool:
        """Whether it is time to ask `must_save`. Asked on every rank at every step; one yes is enough."""

    def must_save(self) -> bool:
        """Whether a machine is about to go, which calls for a checkpoint now. Every rank is asked; may wait for all."""


@dataclass
class LocalSession:
    """A run in this process: progress goes to standard output, and nothing asks it to stop."""

    events: EventLog | None = None
    """Where events go; None forgets them."""

    @property
    def owner(self) -> str:
        """See `Session.owner`."""
        return this_process()

    def progress(self, progress: Progress) -> None:
        """See `Session.progress`."""
        show(progress)

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

    def listens(self) -> bool:
        """See `Session.listens`."""
        return False

    def must_save(self) -> bool:
        """See `Session.must_save`."""
        return False


@dataclass
class SignaledSession(LocalSession):
    """A run in this process that SIGINT and SIGTERM ask to stop; a second one interrupts at once."""

    _stop: bool = field(default=False, init=False)

    def stop_requested(self) -> bool:
        """See `Session.stop_requested`."""
        return self._stop

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals until the block ends; in the main thread."""
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        print("stopping: a checkpoint is saved; the same again leaves at once", file=sys.stderr, flush=True)
        self._stop = True
        signal.signal(number, signal.default_int_handler)
