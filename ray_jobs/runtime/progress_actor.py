"""The board: where workers post how far they are and what happened, and the driver reads it."""

import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vavae.progress import Progress
from vavae.runs.events import Event


class News(NamedTuple):
    """What the driver finds on the board."""

    progress: Progress | None
    """The latest one that was posted."""
    advanced: int
    """The sum of all advances."""
    events: list[Event]
    """What happened since it looked last."""


class _BoardActor:
    """Holds the latest progress, what happened, and the messages that go the other way."""

    def __init__(self) -> None:
        self._latest: Progress | None = None
        self._advanced = 0
        self._events: list[Event] = []
        self._begun = 0
        self._stop = False
        self._error: str | None = None
        self._outage: str | None = None

    def post(self, progress: Progress) -> None:
        self._latest = progress

    def advance(self, amount: int) -> None:
        self._advanced += amount

    def record(self, event: Event) -> None:
        self._events.append(event)

    def begin(self) -> int:
        self._begun += 1
        return self._begun

    def read(self) -> News:
        events, self._events = self._events, []
        return News(self._latest, self._advanced, events)

    def request_stop(self) -> None:
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop

    def fail(self, error: str) -> None:
        self._error = error

    def error(self) -> str | None:
        return self._error

    def lament(self, outage: str) -> None:
        self._outage = outage

    def outage(self) -> str | None:
        return self._outage


class Board:
    """A handle to the board, for driver and workers alike; the process that makes it keeps the board alive.

    Args:
        name: of a board that there is already; None makes one.
    """

    def __init__(self, name: str | None = None) -> None:
        self._name = name or f"board-{uuid.uuid4().hex}"
        self._actor: Any = ray.get_actor(self._name) if name else on_this_node(_BoardActor, name=self._name).remote()
        self._asked: Any = None

    def __reduce__(self) -> tuple[type["Board"], tuple[str]]:
        # By name: an actor that got a handle as an argument could not be restarted.
        return Board, (self._name,)

    def post(self, progress: Progress) -> None:
        """Say how far a stage is."""
        self._actor.post.remote(progress)

    def advance(self, amount: int) -> None:
        """Add to what pooled tasks have done together."""
        self._actor.advance.remote(amount)

    def record(self, event: Event) -> None:
        """Leave what happened for the driver to write down."""
        self._actor.record.remote(event)

    def begin(self) -> int:
        """Say that the workers have started; how often they have by now."""
        return ray.get(self._actor.begin.remote())

    def read(self) -> News:
        """What there is; of events, those since it was read last."""
        return ray.get(self._actor.read.remote())

    def request_stop(self) -> None:
        """Ask the workers to save and leave."""
        self._actor.request_stop.remote()

    def stop_requested(self) -> bool:
        """Whether somebody asked. Never waits: the answer is the one to the previous question."""
        answer = False
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            answer, self._asked = ray.get(self._asked), None
        if self._asked is None:
            self._asked = self._actor.stop_requested.remote()
        return answer

    def fail(self, error: str) -> None:
        """Leave a user's error for the driver."""
        ray.get(self._actor.fail.remote(error))

    def error(self) -> str | None:
        """The user's error that a worker left."""
        return ray.get(self._actor.error.remote())

    def lament(self, outage: str) -> None:
        """Tell the driver of what another try may find mended."""
        ray.get(self._actor.lament.remote(outage))

    def outage(self) -> str | None:
        """What a worker lamented last."""
        return ray.get(self._actor.outage.remote())


def on_this_node(actor: type, **options: Any) -> Any:
    """An actor class without resources whose actors stay with their driver: no other node takes them away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(actor).options(scheduling_strategy=here, **options)


@contextmanager
def stopped_by_signals(board: Board) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a polite request; a second one interrupts at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        text = "stopping: the workers save a checkpoint and leave; the same again leaves at once"
        print(text, file=sys.stderr, flush=True)
        board.request_stop()
        signal.signal(number, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
