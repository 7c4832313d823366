"""Events of a run, as JSON lines in immutable segments, because an object store cannot append."""

import json
import logging
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal

from vavae.finite import finite_row
from vavae.storage.storage import Storage

logger = logging.getLogger(__name__)

EVENTS = "events"
"""Folder of the segments, in that of the run."""

Kind = Literal[
    "started",  # a command that has something to do
    "stage_begun",
    "restored",  # a training resumes from a checkpoint
    "checkpoint",  # is on its way to storage
    "restart",  # of all workers, because one was lost
    "skipped_step",
    "loss_spike",
    "collapse",  # of a training, while all its numbers are finite
    "rollback",
    "measured",  # a checkpoint, for what it generates
    "measure_skipped",
    "stop",  # asked for; a checkpoint is there to resume from
    "failed",
    "stage_done",
    "done",  # all that the command had to do
]


def _now() -> str:
    return datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="microseconds")


@dataclass(frozen=True)
class Event:
    """One event of a run."""

    event: Kind
    stage: str | None = None
    """Job, where it concerns one."""
    images: int | None = None
    """Images seen by then, in a training."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the line."""
    time: str = field(default_factory=_now)
    """Moment in UTC, ISO 8601."""

    def line(self) -> str:
        """The event as a line of JSON, without fields that have no value, and null for figures that are not finite."""
        known = {name: value for name, value in asdict(self).items() if value not in (None, {})}
        details = known.pop("details", {})
        return json.dumps(finite_row({"time": known.pop("time"), **known, **details}), allow_nan=False) + "\n"


class EventLog:
    """Writer of a run's events. A store that fails now gets them with the next ones.

    Args:
        run: folder of the run.
    """

    def __init__(self, run: Storage) -> None:
        self._storage = run.child(EVENTS)
        self._unwritten: list[Event] = []
        self._lock = threading.Lock()

    def add(self, *events: Event) -> None:
        """Write events as one segment; a store that fails is logged and no error."""
        with self._lock:
            self._unwritten += events
            if not self._unwritten:
                return
            moment = self._unwritten[0].time[:26].replace("-", "").replace(":", "")
            lines = "".join(event.line() for event in self._unwritten)
            try:
                self._storage.write_bytes(f"{moment}-{uuid.uuid4().hex[:8]}.jsonl", lines.encode())
            except OSError as error:
                logger.warning("%d events are not written yet: %s", len(self._unwritten), error)
            else:
                self._unwritten = []


def read_events(run: Storage) -> list[dict[str, Any]]:
    """Read all events of a run in the order in which they happened.

    Args:
        run: folder of the run.
    """
    segments = run.child(EVENTS)
    lines = [line for name in segments.list() for line in segments.read_bytes(name).decode().splitlines()]
    return sorted(map(json.loads, lines), key=lambda event: event["time"])
