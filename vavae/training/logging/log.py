"""Rows of metrics, kept as immutable segments beside the checkpoints, and shown in trackers."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from PIL.Image import Image

from vavae.data.image import png_bytes
from vavae.finite import finite_row
from vavae.storage.storage import Storage
from vavae.tracking.tracker import Tracker
from vavae.tracking.trackers import show_row

Show = Callable[[Mapping[str, float]], None]


def _show_nowhere(row: Mapping[str, float]) -> None:
    """Show a row nowhere else."""


class MetricsLog:
    """Log of one training. It writes one segment per checkpoint, because an object store cannot append.

    Args:
        job: name of the training; `stage` in every row.
        segments: folder of the segments.
        trackers: what shows the rows besides, closed by whoever opened them.
        active: whether this process writes (rank 0); elsewhere rows are shown and no more.
        show: called with every row of this rank.
    """

    def __init__(
        self, job: str, segments: Storage, trackers: Sequence[Tracker], active: bool, show: Show = _show_nowhere
    ) -> None:
        self._job, self._segments, self._trackers, self._active = job, segments, trackers, active
        self._show = show
        self._rows: list[dict[str, Any]] = []

    def rewind(self, images_seen: int) -> None:
        """Open the log, dropping all rows after the checkpoint from which the training resumes."""
        if not self._active:
            return
        for name in self._segments.list():
            if _images(name) > images_seen:
                self._segments.delete(name)
        self._rows = []
        for tracker in self._trackers:
            tracker.rewind(images_seen)

    def last_rows(self, count: int, images_seen: int) -> list[dict[str, Any]]:
        """Read the last rows that are written, of those up to so many images seen, in order; none on other ranks."""
        rows: list[dict[str, Any]] = []
        for name in reversed(self._segments.list() if self._active else []):
            if len(rows) >= count:
                break
            if _images(name) <= images_seen:
                rows = [*_read_segment(self._segments, name), *rows]
        return rows[-count:]

    def add(self, images_seen: int, row: Mapping[str, float]) -> None:
        """Add a row, or further metrics to the last row where it has the same images seen."""
        self._show(row)
        if not self._active:
            return
        if not self._rows or self._rows[-1]["images"] != images_seen:
            self._rows.append({"stage": self._job, "images": images_seen})
        self._rows[-1] |= row
        show_row(self._trackers, images_seen, row)

    def picture(self, images_seen: int, name: str, picture: Image, folder: Storage) -> None:
        """Keep a picture: in trackers, and as a file of a folder, which is named by the images seen."""
        if not self._active:
            return
        folder.write_bytes(f"{images_seen:012d}.png", png_bytes(picture))
        for tracker in self._trackers:
            tracker.picture(images_seen, name, picture)

    def flush_segment(self, images_seen: int) -> Callable[[], None]:
        """Make a segment of the rows since the last; returns a function that writes it, in whatever thread."""
        if not self._active:
            return _write_nothing
        text = rows_text(self._rows)
        self._rows = []
        uploads = [tracker.flush() for tracker in self._trackers]

        def write() -> None:
            self._segments.write_bytes(f"{images_seen:012d}.jsonl", text.encode())
            for upload in uploads:
                upload()

        return write


def _write_nothing() -> None:
    """Write nothing, on all ranks but rank 0."""


def rows_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as lines of JSON, with null for each figure that is not finite."""
    return "".join(json.dumps(finite_row(row), allow_nan=False) + "\n" for row in rows)


def read_rows(segments: Storage) -> list[dict[str, Any]]:
    """Read all rows of a training, in order; NaN stands for figures that were not finite."""
    return [row for name in segments.list() for row in _read_segment(segments, name)]


def latest_row(segments: Storage) -> dict[str, Any]:
    """Read the last row of a training without those before it; empty where there is none."""
    for name in reversed(segments.list()):
        rows = _read_segment(segments, name)
        if rows:
            return rows[-1]
    return {}


def _read_segment(segments: Storage, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in segments.read_bytes(name).decode().splitlines()]
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


def _images(segment: str) -> int:
    return int(segment.removesuffix(".jsonl"))
