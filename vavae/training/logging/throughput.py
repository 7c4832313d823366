"""Terms, time and bytes of an interval of steps, as one row of metrics of all ranks."""

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from vavae.distributed.world import World
from vavae.storage.retry import COUNTERS, Counts
from vavae.training.logging.stopwatch import Stopwatch
from vavae.training.step import StepResult

_COUNTS = tuple(f"storage/{name}" for name in Counts._fields)
_UNREADABLE = "unreadable_images"
_SAVED_BYTES = "checkpoint/bytes"


class ThroughputMeter:
    """Means of the terms since the last row, shares of time, memory, and requests to stores.

    Args:
        world: the ranks.
        stopwatch: measures the time of the step's phases.
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
        self._norms: dict[str, list[Tensor]] = {}

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
        """Add the result of a step of so many images."""
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
        """Make the row of the steps since the last one, over all ranks, and reset. Every rank calls it."""
        sums = self._world.sum_terms({**self._sums, **self._ratios, **self._counts_so_far()})
        spent = {**self._waited, **self._stopwatch.read()}
        seconds = time.perf_counter() - self._start
        row = {name: sums[name] / count for name, count in self._counts.items()}
        for part in self._ratios:
            name, kind = part.split("#")
            if kind == "total" and sums[f"{name}#count"]:
                row[name] = sums[part] / sums[f"{name}#count"]
        row |= {name: sum(torch.stack(norms).tolist()) / len(norms) for name, norms in self._norms.items()}
        row["images_per_second"] = self._images / seconds
        row |= {name: part / seconds for name, part in spent.items()}
        if sums[_SAVED_BYTES]:
            row |= {_SAVED_BYTES: sums[_SAVED_BYTES], "checkpoint/stall_seconds": self._waited["checkpoint_wait"]}
        row |= _gpu_memory(self._world.device)
        if self._skipped:
            row["skipped_steps"] = self._skipped
        if self._spikes:
            row["loss_spikes"] = self._spikes
        row |= self._store_counts(sums)
        if sums[_UNREADABLE]:
            # In another epoch another rank meets the same image.
            row[_UNREADABLE] = len({name for names in self._world.gather(sorted(self._unreadable)) for name in names})
        self._reset()
        return row

    def _counts_so_far(self) -> dict[str, Tensor]:
        """Counts of this rank since the beginning; bytes of checkpoints since the last row."""
        counts = [now - before for now, before in zip(COUNTERS.read(), self._counted_before, strict=True)]
        counts += [len(self._unreadable), self._saved_bytes]
        return dict(zip((*_COUNTS, _UNREADABLE, _SAVED_BYTES), torch.tensor(counts, dtype=torch.float64), strict=True))

    def _store_counts(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Counts of all ranks since the last row; empty until there is one, as on local disks."""
        before, self._counts_of_world = self._counts_of_world, {name: sums[name] for name in _COUNTS}
        if not any(self._counts_of_world.values()):
            return {}
        return {name: total - before[name] for name, total in self._counts_of_world.items()}


def _gpu_memory(device: torch.device) -> dict[str, float]:
    """Memory of the GPU that this process has taken, and its peak since the last call, bytes; empty on a CPU."""
    if device.type != "cuda":
        return {}
    memory = {
        "gpu_memory/peak_bytes": float(torch.cuda.max_memory_allocated(device)),
        "gpu_memory/reserved_bytes": float(torch.cuda.memory_reserved(device)),
    }
    torch.cuda.reset_peak_memory_stats(device)
    return memory
