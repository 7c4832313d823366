"""The progress actor: workers report progress and events to it, and the driver reads them."""

import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vavae.progress import Progress
from vavae.runs.events import Event

_ADVANCE_SECONDS = 1.0
"""Shortest time between two reports of how far a pooled task is: a call for every image would fill Ray's task list."""


class ProgressUpdate(NamedTuple):
    """Reports of the workers since the driver read them last."""

    progress: Progress | None
    """The latest progress that was reported as a whole; None for pooled tasks as long as they only advance."""
    advanced: int
    """Images that all pooled tasks have done together."""
    events: list[Event]
    """Events since the last read."""


class _ProgressActor:
    """Holds the latest progress, the events, the errors of workers, and the request to stop."""

    def __init__(self) -> None:
        self._latest: Progress | None = None
        self._advanced = 0
        self._events: list[Event] = []
        self._starts = 0
        self._stop = False
        self._error: str | None = None
        self._outage: str | None = None

    def report(self, progress: Progress) -> None:
        self._latest = progress

    def advance(self, images: int) -> None:
        self._advanced += images

    def record(self, event: Event) -> None:
        self._events.append(event)

    def count_start(self) -> int:
        self._starts += 1
        return self._starts

    def read(self) -> ProgressUpdate:
        events, self._events = self._events, []
        return ProgressUpdate(self._latest, self._advanced, events)

    def request_stop(self) -> None:
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop

    def report_error(self, error: str) -> None:
        self._error = error

    def error(self) -> str | None:
        return self._error

    def report_outage(self, outage: str) -> None:
        self._outage = outage

    def outage(self) -> str | None:
        return self._outage


class SpacedSum:
    """Sums counts from any thread, and sends the sum at most once in so many seconds.

    Args:
        send: takes what has come together since the last time.
        seconds: shortest time between two sendings.
    """

    def __init__(self, send: Callable[[int], Any], seconds: float = _ADVANCE_SECONDS) -> None:
        self._send, self._seconds = send, seconds
        self._lock, self._kept, self._sent_at = threading.Lock(), 0, -seconds

    def add(self, count: int) -> None:
        """Add a count, and send the sum where the time has come."""
        with self._lock:
            self._kept += count
            if time.monotonic() - self._sent_at >= self._seconds:
                self._flush()

    def flush(self) -> None:
        """Send what is left."""
        with self._lock:
            if self._kept:
                self._flush()

    def _flush(self) -> None:
        self._send(self._kept)
        self._kept, self._sent_at = 0, time.monotonic()


class ProgressActor:
    """A handle to a progress actor, for driver and workers; the actor lives as long as the process that made it.

    Args:
        name: of an existing actor; None makes one.
    """

    def __init__(self, name: str | None = None) -> None:
        self._name = name or f"progress-{uuid.uuid4().hex}"
        self._actor: Any = ray.get_actor(self._name) if name else on_this_node(_ProgressActor, name=self._name).remote()
        self._stop_query: Any = None
        self.advances = SpacedSum(self._actor.advance.remote)
        """Images that pooled tasks have done; who ends a task flushes it."""

    def __reduce__(self) -> tuple[type["ProgressActor"], tuple[str]]:
        # By name: an actor that got a handle as an argument could not be restarted.
        return ProgressActor, (self._name,)

    def report(self, progress: Progress) -> None:
        """Report the progress of a training, or of what a pooled task does after its images."""
        self._actor.report.remote(progress)

    def advance(self, images: int) -> None:
        """Add images that a pooled task has done; they are reported within a second while it goes on."""
        self.advances.add(images)

    def record(self, event: Event) -> None:
        """Hand an event to the driver, which writes it down."""
        self._actor.record.remote(event)

    def count_start(self) -> int:
        """Count a start of the workers; returns the number of starts so far."""
        return ray.get(self._actor.count_start.remote())

    def read(self) -> ProgressUpdate:
        """Read the progress so far, and the events since the last read."""
        return ray.get(self._actor.read.remote())

    def request_stop(self) -> None:
        """Ask the workers to save a checkpoint and stop."""
        self._actor.request_stop.remote()

    def stop_requested(self) -> bool:
        """Return whether a stop was requested. Never waits: the answer is to the previous call's query."""
        answer = False
        if self._stop_query is not None and ray.wait([self._stop_query], timeout=0)[0]:
            answer, self._stop_query = ray.get(self._stop_query), None
        if self._stop_query is None:
            self._stop_query = self._actor.stop_requested.remote()
        return answer

    def report_error(self, error: str) -> None:
        """Report a user's error, which a restart can't mend."""
        ray.get(self._actor.report_error.remote(error))

    def error(self) -> str | None:
        """The user's error that a worker reported."""
        return ray.get(self._actor.error.remote())

    def report_outage(self, outage: str) -> None:
        """Report an error that another attempt may not meet."""
        ray.get(self._actor.report_outage.remote(outage))

    def outage(self) -> str | None:
        """The outage that a worker reported last."""
        return ray.get(self._actor.outage.remote())


def on_this_node(actor: type, **options: Any) -> Any:
    """Make a class a Ray actor without resources that stays on the driver's node, whatever happens to other nodes."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(actor).options(scheduling_strategy=here, **options)
