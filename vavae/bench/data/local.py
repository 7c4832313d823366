"""Benchmarks of one core reading shards in the page cache."""

from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path

import numpy as np
import torch

from vavae.bench.benchmark import VAVAE_SIDE, Benchmark, processor_rate
from vavae.bench.data.baselines import baselines, in_batches, latent_batches
from vavae.bench.data.shards import BATCH, SPLIT, make_images, make_latents, write_images, write_latent_shard
from vavae.bench.data.vavae_readers import image_stream, latent_stream, places, read, tar_records
from vavae.data.image import decode_image
from vavae.data.image_stream import MicroBatchKey
from vavae.storage.storage import Storage

_UNIT = "img/s of processor"


def image_benchmarks(folder: Path, count: int) -> Iterator[Benchmark]:
    """Benchmarks of records of a tar, and of batches of decoded JPEG images, also against the decoder alone."""
    storage, files = Storage(str(folder)), make_images(count)
    manifest, steps = write_images(storage, files), range(count // BATCH)
    (shard,) = manifest.splits[SPLIT]
    tar = storage.local_file(f"{SPLIT}/{shard.name}")
    others = baselines(tar, files, folder)
    readers = {**{other.name: other.records for other in others}, VAVAE_SIDE: lambda: tar_records(tar)}
    for name, records in readers.items():
        assert list(records()) == files, f"{name} reads other records"
    yield Benchmark("tar records", _UNIT, {name: _record_rate(records) for name, records in readers.items()})

    stream = image_stream(storage, manifest)
    images = torch.cat([stream[MicroBatchKey(0, step)].images for step in steps])
    for other in others:
        decoded = torch.cat(list(other.batches()))[places([shard], steps)]
        assert torch.equal(decoded, images), f"{other.name} decodes other pixels"
    batches = processor_rate(lambda: read(image_stream(storage, manifest), steps))
    yield Benchmark(
        "JPEG batches", _UNIT, {**{other.name: _sample_rate(other.batches) for other in others}, VAVAE_SIDE: batches}
    )
    yield Benchmark("JPEG batches", _UNIT, {"bare decoder": _sample_rate(lambda: _decoded(files)), VAVAE_SIDE: batches})


def latent_benchmarks(folder: Path, count: int) -> Iterator[Benchmark]:
    """Benchmark of batches of latents."""
    storage, steps = Storage(str(folder)), range(count // BATCH)
    manifest = write_latent_shard(storage, make_latents(count))
    (shard,) = manifest.splits[SPLIT]
    tar = storage.local_file(f"{SPLIT}/{shard.name}")
    stream = latent_stream(storage, manifest)
    means = torch.cat([stream[MicroBatchKey(0, step)].mean for step in steps])
    expected = torch.cat(list(latent_batches(tar)))[places([shard], steps)]
    assert torch.equal(means, expected), "webdataset reads other latents"
    sides = {
        "webdataset": _sample_rate(lambda: latent_batches(tar)),
        VAVAE_SIDE: processor_rate(lambda: read(latent_stream(storage, manifest), steps)),
    }
    yield Benchmark("latent batches", _UNIT, sides)


def _decoded(files: Iterable[bytes]) -> Iterator[list[np.ndarray]]:
    return ([decode_image(data) for data in batch] for batch in in_batches(files))


def _record_rate(records: Callable[[], Iterator[bytes]]) -> Callable[[], float]:
    return processor_rate(lambda: sum(1 for _ in records()))


def _sample_rate(batches: Callable[[], Iterator[Sized]]) -> Callable[[], float]:
    return processor_rate(lambda: sum(len(batch) for batch in batches()))
