"""Rows of metrics, kept as immutable segments beside the checkpoints, and in TensorBoard."""

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL.Image import Image

from vavae.data.image import png_bytes
from vavae.finite import finite_row
from vavae.storage.storage import Storage

if TYPE_CHECKING:  # who only reads rows, as `vavae status`, needs no torch, which takes seconds to import
    from torch.utils.tensorboard import SummaryWriter

Show = Callable[[Mapping[str, float]], None]


def _show_nowhere(row: Mapping[str, float]) -> None:
    """Show a row nowhere else."""


class MetricsLog:
    """Log of one training. It writes one segment per checkpoint, because an object store cannot append.

    Args:
        job: name of the training; `stage` in every row.
        segments: folder of the segments.
        tensorboard: folder of TensorBoard's files.
        active: whether this process writes (rank 0); elsewhere rows are shown and no more.
        show: called with every row of this rank.
    """

    def __init__(
        self, job: str, segments: Storage, tensorboard: Storage, active: bool, show: Show = _show_nowhere
    ) -> None:
        self._job, self._segments, self._tensorboard, self._active = job, segments, tensorboard, active
        self._show = show
        self._rows: list[dict[str, Any]] = []
        self._writer: SummaryWriter | None = None
        self._scratch = None if tensorboard.is_local else tempfile.TemporaryDirectory(prefix="vavae-")

    def rewind(self, images_seen: int) -> None:
        """Open the log, dropping all rows after the checkpoint from which the training resumes."""
        if not self._active:
            return
        from torch.utils.tensorboard import SummaryWriter

        for name in self._segments.list():
            if _images(name) > images_seen:
                self._segments.delete(name)
        self._rows = []
        if self._writer is not None:
            self._writer.close()
        folder = self._scratch.name if self._scratch else self._tensorboard.url()
        self._writer = SummaryWriter(folder, purge_step=images_seen + 1)

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
        assert self._writer is not None, "rewind opens the log"
        if not self._rows or self._rows[-1]["images"] != images_seen:
            self._rows.append({"stage": self._job, "images": images_seen})
        self._rows[-1] |= row
        _show_scalars(self._writer, images_seen, row)

    def picture(self, images_seen: int, name: str, picture: Image, folder: Storage) -> None:
        """Keep a picture: in TensorBoard, and as a file of a folder, which is named by the images seen."""
        if not self._active:
            return
        folder.write_bytes(f"{images_seen:012d}.png", png_bytes(picture))
        assert self._writer is not None, "rewind opens the log"
        self._writer.add_image(name, np.asarray(picture.convert("RGB")), images_seen, dataformats="HWC")

    def flush_segment(self, images_seen: int) -> Callable[[], None]:
        """Make a segment of the rows since the last; returns a function that writes it, in whatever thread."""
        if not self._active:
            return _write_nothing
        assert self._writer is not None, "rewind opens the log"
        text = rows_text(self._rows)
        self._rows = []
        self._writer.flush()
        return lambda: self._write(f"{images_seen:012d}.jsonl", text)

    def _write(self, name: str, text: str) -> None:
        self._segments.write_bytes(name, text.encode())
        if self._scratch:
            for file in Path(self._scratch.name).iterdir():
                self._tensorboard.put_file(file, file.name)

    def close(self) -> None:
        """Close the log; rows that were not flushed are lost."""
        if self._writer is not None:
            self._writer.close()
        if self._scratch:
            self._scratch.cleanup()


def _write_nothing() -> None:
    """Write nothing, on all ranks but rank 0."""


def show_checkpoint_metrics(tensorboard: Storage, images_seen: int, metrics: Mapping[str, float]) -> None:
    """Add metrics of one checkpoint to TensorBoard, in a file of its own: another process trains meanwhile."""
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory(prefix="vavae-") as scratch:
        with SummaryWriter(scratch) as writer:
            _show_scalars(writer, images_seen, metrics)
        for file in Path(scratch).iterdir():
            tensorboard.put_file(file, file.name)


def _show_scalars(writer: "SummaryWriter", images_seen: int, row: Mapping[str, float]) -> None:
    for name, value in finite_row(row).items():
        if value is not None:
            writer.add_scalar(name, value, images_seen)


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
