"""Rows of metrics: averaged over an interval, kept as immutable segments beside the checkpoints, and in TensorBoard."""

import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from vavae.distributed.world import World
from vavae.storage.retry import COUNTERS, Counts
from vavae.storage.storage import Storage
from vavae.training.step import StepResult
from vavae.training.stopwatch import Stopwatch

_COUNTS = tuple(f"storage/{name}" for name in Counts._fields)
_UNREADABLE = "unreadable_images"
_SAVED_BYTES = "checkpoint/bytes"


class Meter:
    """Means of the terms since the last row, where time and memory went, and what was asked of stores.

    Args:
        world: the ranks.
        stopwatch: keeps the time of the step's phases.
        unreadable: names of the unreadable images that this rank has met, as they become known.
    """

    def __init__(self, world: World, stopwatch: Stopwatch, unreadable: Collection[str] = ()) -> None:
        self._world, self._stopwatch, self._unreadable = world, stopwatch, unreadable
        self._counted_before, self._counts_of_world = COUNTERS.read(), dict.fromkeys(_COUNTS, 0.0)
        self._reset()

    def _reset(self) -> None:
        self._start, self._images, self._skipped, self._spikes = time.perf_counter(), 0, 0, 0
        self._saved_bytes = 0
        self._waited: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._ratios: dict[str, Tensor] = {}
        self._norms: dict[str, list[float]] = {}

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Count the time inside as waiting; the row has its share under this name."""
        start = time.perf_counter()
        yield
        self._waited[name] = self._waited.get(name, 0.0) + time.perf_counter() - start

    def saved(self, size: int) -> None:
        """Count bytes that this rank copied for a checkpoint."""
        self._saved_bytes += size

    def skip(self, images: int) -> None:
        """Count a step that was not applied."""
        self._images += images
        self._skipped += 1

    def spike(self) -> None:
        """Count a step whose loss is a spike."""
        self._spikes += 1

    def add(self, result: StepResult, images: int) -> None:
        """Take one step in."""
        self._images += images
        for name, value in result.terms.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        for name, (total, count) in result.ratios.items():
            for part, value in ((f"{name}#total", total), (f"{name}#count", count)):
                self._ratios[part] = self._ratios[part] + value if part in self._ratios else value
        for name, norm in result.gradient_norms.items():
            self._norms.setdefault(name, []).append(norm)

    def row(self) -> dict[str, float]:
        """The means since the last row, over all ranks; every rank calls it."""
        sums = self._world.sum_terms({**self._sums, **self._ratios, **self._counts_so_far()})
        spent = {**self._waited, **self._stopwatch.read()}
        seconds = time.perf_counter() - self._start
        row = {name: sums[name] / count for name, count in self._counts.items()}
        for part in self._ratios:
            name, kind = part.split("#")
            if kind == "total" and sums[f"{name}#count"]:
                row[name] = sums[part] / sums[f"{name}#count"]
        row |= {name: sum(norms) / len(norms) for name, norms in self._norms.items()}
        row["images_per_second"] = self._images / seconds
        row |= {name: part / seconds for name, part in spent.items()}
        if sums[_SAVED_BYTES]:
            row |= {_SAVED_BYTES: sums[_SAVED_BYTES], "checkpoint/stall_seconds": self._waited["checkpoint_wait"]}
        row |= _gpu_memory(self._world.device)
        if self._skipped:
            row["skipped_steps"] = self._skipped
        if self._spikes:
            row["loss_spikes"] = self._spikes
        row |= self._asked_of_stores(sums)
        if sums[_UNREADABLE]:
            # In another epoch another rank meets the same image.
            row[_UNREADABLE] = len({name for names in self._world.gather(sorted(self._unreadable)) for name in names})
        self._reset()
        return row

    def _counts_so_far(self) -> dict[str, Tensor]:
        """What this rank has counted since the beginning, but for what it saved, which is since the last row."""
        counts = [now - before for now, before in zip(COUNTERS.read(), self._counted_before, strict=True)]
        counts += [len(self._unreadable), self._saved_bytes]
        return dict(zip((*_COUNTS, _UNREADABLE, _SAVED_BYTES), torch.tensor(counts, dtype=torch.float64), strict=True))

    def _asked_of_stores(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What all ranks counted since the last row; nothing until there is something, as on local disks."""
        before, self._counts_of_world = self._counts_of_world, {name: sums[name] for name in _COUNTS}
        if not any(self._counts_of_world.values()):
            return {}
        return {name: total - before[name] for name, total in self._counts_of_world.items()}


def _gpu_memory(device: torch.device) -> dict[str, float]:
    """What this process takes of its GPU, and took at most since it was last asked; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    memory = {
        "gpu_memory/peak_bytes": float(torch.cuda.max_memory_allocated(device)),
        "gpu_memory/reserved_bytes": float(torch.cuda.memory_reserved(device)),
    }
    torch.cuda.reset_peak_memory_stats(device)
    return memory


Show = Callable[[Mapping[str, float]], None]


def _unseen(row: Mapping[str, float]) -> None:
    """Nobody else looks at a row."""


class MetricsLog:
    """The rows of one training run. One segment per checkpoint, because an object store cannot append.

    Args:
        stage: name of the job; part of every row.
        segments: where the segments go.
        tensorboard: where TensorBoard's files go.
        active: whether this process writes (rank 0); elsewhere rows are shown and no more.
        show: gets every row of this rank too.
    """

    def __init__(self, stage: str, segments: Storage, tensorboard: Storage, active: bool, show: Show = _unseen) -> None:
        self._stage, self._segments, self._tensorboard, self._active = stage, segments, tensorboard, active
        self._show = show
        self._rows: list[dict[str, Any]] = []
        self._writer: SummaryWriter | None = None
        self._scratch = None if tensorboard.is_local else tempfile.TemporaryDirectory(prefix="vavae-")

    def rewind(self, images_seen: int) -> None:
        """Drop what was logged after the checkpoint that the run goes on from, by whatever attempt; opens the log."""
        if not self._active:
            return
        for name in self._segments.list():
            if _images(name) > images_seen:
                self._segments.delete(name)
        self._rows = []
        if self._writer is not None:
            self._writer.close()
        folder = self._scratch.name if self._scratch else self._tensorboard.url()
        self._writer = SummaryWriter(folder, purge_step=images_seen + 1)

    def add(self, images_seen: int, row: Mapping[str, float]) -> None:
        """Keep one row, or more of the last one where it is of the same images."""
        self._show(row)
        if not self._active:
            return
        assert self._writer is not None, "rewind opens the log"
        if not self._rows or self._rows[-1]["images"] != images_seen:
            self._rows.append({"stage": self._stage, "images": images_seen})
        self._rows[-1] |= row
        for name, value in row.items():
            self._writer.add_scalar(name, value, images_seen)

    def picture(self, images_seen: int, name: str, picture: Image) -> None:
        """Show a picture in TensorBoard."""
        if not self._active:
            return
        assert self._writer is not None, "rewind opens the log"
        self._writer.add_image(name, np.asarray(picture.convert("RGB")), images_seen, dataformats="HWC")

    def seal(self, images_seen: int) -> Callable[[], None]:
        """Make one segment of the rows since the last; what is returned writes it, in whatever thread."""
        if not self._active:
            return _nothing
        assert self._writer is not None, "rewind opens the log"
        text = "".join(json.dumps(row) + "\n" for row in self._rows)
        self._rows = []
        self._writer.flush()
        return lambda: self._write(f"{images_seen:012d}.jsonl", text)

    def _write(self, name: str, text: str) -> None:
        self._segments.write_bytes(name, text.encode())
        if self._scratch:
            for file in Path(self._scratch.name).iterdir():
                self._tensorboard.put_file(file, file.name)

    def close(self) -> None:
        """End it; rows that were not sealed are lost."""
        if self._writer is not None:
            self._writer.close()
        if self._scratch:
            self._scratch.cleanup()


def _nothing() -> None:
    """Other ranks have nothing to write."""


def read_rows(segments: Storage) -> list[dict[str, Any]]:
    """All rows of a training run, in order."""
    return [json.loads(line) for name in segments.list() for line in segments.read_bytes(name).decode().splitlines()]


def latest_row(segments: Storage) -> dict[str, Any]:
    """The last row of a training run, without reading those before it; empty where there is none."""
    for name in reversed(segments.list()):
        lines = segments.read_bytes(name).decode().splitlines()
        if lines:
            return json.loads(lines[-1])
    return {}


def _images(segment: str) -> int:
    return int(segment.removesuffix(".jsonl"))
