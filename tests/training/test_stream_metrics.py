"""Metrics of the stream in a row: requests to stores, and images that could not be read."""

from contextlib import closing
from itertools import islice

import pytest
import torch
from support.gloo import GlooLauncher
from support.image_shards import write_image_shards
from support.toy_training import ROUNDS, ToyStep, train_toy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vavae.data.config import StreamConfig
from vavae.data.image_stream import ImageStream, MicroBatchKey
from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import assign_lanes, order_of
from vavae.distributed.world import World
from vavae.storage.retry import COUNTERS, Counts
from vavae.storage.storage import Storage
from vavae.training.logging.log import read_rows
from vavae.training.logging.stopwatch import Stopwatch
from vavae.training.logging.throughput import ThroughputMeter
from vavae.training.step import StepResult

PER_SLICE = Counts(bytes_read=10, requests=2, retries=1)


class Asking:
    """Slices that cost requests."""

    def __getitem__(self, key: MicroBatchKey) -> MicroBatchKey:
        """See `MicroBatchSource`."""
        COUNTERS.add(**PER_SLICE._asdict())
        return key


def asked(before: Counts) -> Counts:
    """Counts of this process since an earlier reading."""
    return Counts(*(now - then for now, then in zip(COUNTERS.read(), before, strict=True)))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_loader_processes_count_is_counted_here_once(workers: int) -> None:
    before = COUNTERS.read()
    accumulation_steps = assign_lanes(3, 0, 1)
    with closing(load_micro_batches(Asking(), accumulation_steps, 0, workers)) as micro_batches:
        for step in islice(micro_batches, 4):
            assert len(step) == len(accumulation_steps)
    assert asked(before) == Counts(*(12 * count for count in PER_SLICE))


class AskingStep(ToyStep):
    """A training whose micro-batches cost requests."""

    def __getitem__(self, key: MicroBatchKey) -> torch.Tensor:
        """See `MicroBatchSource`."""
        Asking()[key]
        return super().__getitem__(key)


def test_rows_count_requests_to_stores_since_the_last(storage: Storage) -> None:
    train_toy(storage, AskingStep(), images=24, log_images=8)  # two micro-batches of 4 a row
    rows = read_rows(storage.child("log"))
    assert len(rows) == 3
    for row in rows:
        found = {name: value for name, value in row.items() if name.startswith("storage/")}
        assert found == {f"storage/{name}": 2 * count for name, count in PER_SLICE._asdict().items()}
    events = EventAccumulator(storage.url("tensorboard")).Reload()
    assert [scalar.value for scalar in events.Scalars("storage/bytes_read")] == [20, 20, 20]


def test_rows_of_local_runs_have_no_zeros(storage: Storage) -> None:
    COUNTERS.add(requests=1)  # before the training
    train_toy(storage, images=8)
    for row in read_rows(storage.child("log")):
        assert not [name for name in row if name.startswith("storage/") or "unreadable" in name]


def rows_of_rank(world: World) -> list[dict[str, float]]:
    """Rows of ranks that ask for different things and meet one unreadable image together."""
    unreadable: set[str] = set()
    meter, rows = ThroughputMeter(world, Stopwatch(world.device), unreadable), []
    for counts, names in ((Counts(), ()), (PER_SLICE, ("both", f"rank {world.rank}")), (Counts(), ())):
        COUNTERS.add(**{name: (1 + world.rank) * count for name, count in counts._asdict().items()})
        unreadable.update(names)
        meter.add(StepResult({"loss": torch.ones(())}, {}), 1)
        rows.append(meter.row())
    return rows


def test_rows_are_of_all_ranks(gloo: GlooLauncher) -> None:
    for first, second, third in gloo.run(2, rows_of_rank):
        assert not [name for name in first if name.startswith("storage/") or "unreadable" in name]
        for name, count in PER_SLICE._asdict().items():
            assert second[f"storage/{name}"] == 3 * count
            assert third[f"storage/{name}"] == 0
        assert second["unreadable_images"] == third["unreadable_images"] == 3


class ReadingStep(ToyStep):
    """Reads images and learns from something else."""

    def __init__(self, stream: ImageStream) -> None:
        super().__init__()
        self._stream = stream

    def source(self) -> ImageStream:  # type: ignore[override]
        """See `Step.source`."""
        return self._stream

    def run(self, micro_batches, images_seen: int, learning_rate: float, before_update) -> StepResult:
        """See `Step.run`."""
        return super().run([torch.ones(4, 3)], images_seen, learning_rate, before_update)


def test_rows_count_unreadable_images(storage: Storage) -> None:
    manifest = write_image_shards(storage, {"train": (8,)}, damaged=[("train", 3), ("train", 6)])
    config = StreamConfig(lanes=len(ROUNDS), crop="center")
    stream = ImageStream(storage, manifest, "train", order_of([8], 0, config), 4, config, 0)
    train_toy(storage, ReadingStep(stream), images=24, log_images=8)
    assert [row["unreadable_images"] for row in read_rows(storage.child("log"))] == [2, 2, 2]
