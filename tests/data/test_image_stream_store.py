"""Training streams from a real S3 server: exact through faults, from a cache smaller than the data."""

import hashlib
import os
import uuid
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.faulty_proxy import PASSING, Fault, Plan, faulty
from support.gloo import GlooLauncher
from support.image_shards import write_image_shards

from vavae.data.config import StreamConfig
from vavae.data.image_stream import ImageStream
from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import assign_lanes, order_of
from vavae.data.shards.manifest import Manifest
from vavae.distributed.world import World
from vavae.storage.config import StorageOptions
from vavae.storage.retry import COUNTERS, Counts
from vavae.storage.storage import Storage

pytestmark = pytest.mark.gloo

LANES, MICRO_BATCH, SEED = 4, 25, 3


class Reading(NamedTuple):
    """How the ranks of a run read."""

    root: str
    cache: str
    options: dict[str, Any]
    environment: dict[str, str]
    manifest: Manifest
    steps: int
    micro_batch_size: int = MICRO_BATCH
    block: int = 50
    workers: int = 0
    prefetch_bytes: int = 1 << 20


class Read(NamedTuple):
    """Images that one rank has read."""

    micro_batches: list[str]
    """A digest of each, in order."""
    counts: Counts


def read(world: World, reading: Reading) -> Read:
    """Some steps of the stream of one rank, in time with the others."""
    os.environ.update(reading.environment)
    storage = Storage(reading.root, reading.cache, StorageOptions(**reading.options))
    config = StreamConfig(lanes=LANES, block=reading.block, flip=True, open_shards=8)
    order = order_of([shard.count for shard in reading.manifest.splits["train"]], SEED, config)
    stream = ImageStream(storage, reading.manifest, "train", order, reading.micro_batch_size, config, SEED)
    accumulation_steps, found = assign_lanes(LANES, world.rank, world.size), []
    micro_batches = load_micro_batches(
        stream, accumulation_steps, 0, reading.workers, prefetch_bytes=reading.prefetch_bytes, ranks=world.size
    )
    before = COUNTERS.read()
    with closing(micro_batches):
        for step in islice(micro_batches, reading.steps):
            for item in step:
                content = item.images.numpy().tobytes() + item.labels.numpy().tobytes()
                found.append(hashlib.sha256(content).hexdigest())
            world.barrier()
    return Read(found, Counts(*(now - then for now, then in zip(COUNTERS.read(), before, strict=True))))


class EveryKind(Plan):
    """Faults as planned, and a flipped bit in every so manieth read: two in a row would be lasting damage."""

    def __init__(self, seed: int, limit: int, reads_between: int = 40) -> None:
        super().__init__(seed, PASSING, rate=0.7, limit=limit, silence_seconds=0.01)
        self._reads, self._between = 0, reads_between

    def next(self, path: str, is_read: bool) -> tuple[Fault | None, float]:
        """See `Plan.next`."""
        fault, where = super().next(path, is_read)
        with self._lock:
            self._reads += is_read
            if fault is None and is_read and self._reads >= self._between:
                self._reads = 0
                self.happened[Fault.FLIP] += 1
                return Fault.FLIP, where
        return fault, where


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, Manifest]:
    """5,000 images in 60 shards, in a folder."""
    storage = Storage(str(tmp_path_factory.mktemp("shards")))
    return storage, write_image_shards(storage, {"train": (83,) * 59 + (103,)})


@pytest.fixture
def stored(s3, shards: tuple[Storage, Manifest], tmp_path: Path) -> tuple[str, Manifest]:
    """The same shards in a bucket."""
    place = Storage(f"s3://{s3.bucket}/{uuid.uuid4().hex}", str(tmp_path))
    local, manifest = shards
    for path in local.list("train"):
        place.put_file(local.local_file(path), path)
    return place.root, manifest


@pytest.mark.parametrize(("samples", "faults"), [(5_000, 100), pytest.param(100_000, 1_000, marks=pytest.mark.long)])
def test_the_stream_is_the_same_through_faults(
    gloo: GlooLauncher, s3, shards, stored, tmp_path: Path, samples: int, faults: int
) -> None:
    root, manifest = stored
    twelve_shards = 12 * max(shard.bytes for shard in manifest.splits["train"])
    options = {"attempts": 40, "backoff_seconds": 0.002, "read_seconds": 5.0, "cache_bytes": twelve_shards}
    steps = samples // (LANES * MICRO_BATCH)
    local = Reading(shards[0].root, "", {}, {}, manifest, steps)
    plan = EveryKind(7, faults)
    with faulty(s3.endpoint, plan) as endpoint:
        reading = local._replace(
            root=root, cache=str(tmp_path / "cache"), options={**options, "endpoint": endpoint}, workers=2,
            environment=s3.environment, prefetch_bytes=twelve_shards // 4,
        )  # fmt: skip
        (found,) = gloo.run(1, read, reading, grouped=False)
    (expected,) = gloo.run(1, read, local, grouped=False)
    assert len(expected.micro_batches) == steps * LANES
    assert found.micro_batches == expected.micro_batches
    assert plan.happened.total() >= faults, plan.happened
    assert {*plan.happened} == {*Fault}
    assert found.counts.retries > 0
    assert expected.counts == Counts()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_is_fetched_once_an_epoch_by_all_ranks_of_a_node(
    gloo: GlooLauncher, s3, stored, tmp_path: Path, workers: int
) -> None:
    """The cache holds a third of the data; a lane enters the shard at its end when it leaves it for its neighbor."""
    root, manifest = stored
    infos = manifest.splits["train"]
    largest, all_bytes = max(shard.bytes for shard in infos), sum(shard.bytes for shard in infos)
    epochs, ahead = 3, 2
    reading = Reading(
        root, str(tmp_path / "cache"), {"cache_bytes": 20 * largest}, s3.environment, manifest,
        steps=epochs * 50, workers=workers, prefetch_bytes=ahead * largest,
    )  # fmt: skip
    plan = Plan(0, rate=0.0)
    with faulty(s3.endpoint, plan) as endpoint:
        found = gloo.run(2, read, reading._replace(options={**reading.options, "endpoint": endpoint}))
    counted = sum(rank.counts.bytes_read for rank in found)
    # Where a lane ends a shard is met twice; what is fetched ahead at the end belongs to no epoch here.
    boundaries, unread = epochs * (LANES - 1), 2 * (ahead + workers)
    assert epochs * all_bytes * 0.6 < plan.sent_bytes <= epochs * all_bytes + (boundaries + unread) * largest
    assert plan.sent_bytes - 2 * (ahead + workers) * largest <= counted <= plan.sent_bytes
    assert sum(rank.counts.fetched_files for rank in found) <= epochs * len(infos) + boundaries + unread
