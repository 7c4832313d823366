"""Readers of vavae: the streams of training, one lane, over the shards of the benchmarks."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from vavae.bench.data.shards import BATCH, SPLIT
from vavae.data.config import StreamConfig
from vavae.data.image_stream import ImageStream, MicroBatchKey
from vavae.data.sample_order import SampleOrder, order_of
from vavae.data.shards.manifest import Manifest, ShardInfo
from vavae.data.shards.mapped_shard import MappedShard
from vavae.latents.manifest import LatentManifest
from vavae.latents.stream import LatentStream
from vavae.storage.storage import Storage


def tar_records(tar: Path) -> Iterator[bytes]:
    """Encoded images of a shard, in order."""
    shard = MappedShard(tar)
    return (shard[index]["jpg"] for index in range(len(shard)))


def image_stream(storage: Storage, manifest: Manifest) -> ImageStream:
    """Batches of images, shuffled within each shard."""
    shards = manifest.splits[SPLIT]
    return ImageStream(storage, manifest, SPLIT, _order(shards), BATCH, _config(shards), seed=0)


def latent_stream(storage: Storage, manifest: LatentManifest) -> LatentStream:
    """Batches of latents, shuffled within each shard."""
    return LatentStream(storage, manifest, SPLIT, _order(manifest.splits[SPLIT]), BATCH, seed=0, open_shards=1)


def read(stream: ImageStream | LatentStream, steps: range) -> int:
    """Read the batches of some steps, each held until the next one is there, and return how many samples they have."""
    return sum(len(batch.labels) for batch in (stream[MicroBatchKey(0, step)] for step in steps))


def places(shards: Sequence[ShardInfo], steps: range) -> list[int]:
    """Indices of the records of some steps, counted through all shards, which are of one length."""
    order = _order(shards)
    found = [location for step in steps for location in order.micro_batch(0, step, BATCH)]
    return [location.shard * shards[0].count + location.record for location in found]


def _order(shards: Sequence[ShardInfo]) -> SampleOrder:
    return order_of([shard.count for shard in shards], 0, _config(shards))


def _config(shards: Sequence[ShardInfo]) -> StreamConfig:
    """One lane that goes from shard to shard."""
    return StreamConfig(lanes=1, block=shards[0].count, crop="center")
