"""Benchmarks of a real S3 server on loopback, by the wall clock: the server shares the cores with the readers."""

import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

import botocore.session
import torch
from torch import Tensor

from vavae.bench.benchmark import VAVAE_SIDE, Benchmark, Skipped, wall_rate
from vavae.bench.data.baselines import streamed_batches
from vavae.bench.data.shards import BATCH, SPLIT, make_images, write_images
from vavae.bench.data.vavae_readers import image_stream, places
from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import assign_lanes
from vavae.data.shards.manifest import Manifest
from vavae.storage.loopback import s3_server, why_no_s3_server
from vavae.storage.s3 import RetryingS3
from vavae.storage.storage import Storage

_NAME, _UNIT = "S3 stream", "img/s on the wall"
_BUCKET, _PREFIX, _SHARDS = "bench", "images", 4
_URL, _BUFFER_BYTES = f"s3://{_BUCKET}/{_PREFIX}", 1 << 20


def store_benchmarks(folder: Path, count: int) -> Iterator[Benchmark | Skipped]:
    """Benchmarks of batches of decoded JPEG images in the first epoch, with an empty cache, and in the second."""
    reason = why_no_s3_server()
    if reason:
        yield Skipped(_NAME, reason)
        return
    with s3_server(folder / "server", _BUCKET) as server, _environment(server.environment):
        manifest, steps = write_images(Storage(_URL), make_images(count), _SHARDS), range(count // BATCH)
        epochs, client = _Epochs(manifest, len(steps), folder), _PlainClient(manifest)
        decoded = torch.cat(list(streamed_batches(client.open())))[
            places(manifest.splits[SPLIT], range(count // BATCH))
        ]
        assert torch.equal(decoded, torch.cat(list(epochs.read_first()))), "webdataset decodes other pixels"
        reference = wall_rate(lambda: sum(len(batch) for batch in streamed_batches(client.open())))
        yield Benchmark(f"{_NAME}, first epoch", _UNIT, {"webdataset": reference, VAVAE_SIDE: wall_rate(epochs.first)})
        yield Benchmark(
            f"{_NAME}, second epoch", _UNIT, {"webdataset": reference, VAVAE_SIDE: wall_rate(epochs.second)}
        )


class _Epochs:
    """Two epochs of the stream as training reads it, through a cache that is empty before the first."""

    def __init__(self, manifest: Manifest, batches: int, folder: Path) -> None:
        self._manifest, self._folder, self._batches = manifest, folder, batches

    def first(self) -> int:
        return sum(len(images) for images in self.read_first())

    def second(self) -> int:
        return sum(len(images) for images in self._read(self._batches))

    def read_first(self) -> Iterator[Tensor]:
        """Images of the first epoch, uint8 [B, 3, H, W]."""
        cache = tempfile.mkdtemp(prefix="cache-", dir=self._folder)
        self._stream = image_stream(Storage(_URL, cache), self._manifest)
        return self._read(0)

    def _read(self, first_step: int) -> Iterator[Tensor]:
        with closing(load_micro_batches(self._stream, assign_lanes(1, 0, 1), first_step, workers=0)) as steps:
            yield from (micro_batches[0].images for micro_batches in islice(steps, self._batches))


class _PlainClient:
    """Client that streams the shards without a cache."""

    def __init__(self, manifest: Manifest) -> None:
        self._names = [shard.name for shard in manifest.splits[SPLIT]]
        self._client = botocore.session.get_session().create_client("s3")

    def open(self) -> Iterator[io.BufferedReader]:
        """Open one shard after the other."""
        for name in self._names:
            body = self._client.get_object(Bucket=_BUCKET, Key=f"{_PREFIX}/{SPLIT}/{name}")["Body"]
            yield io.BufferedReader(body, _BUFFER_BYTES)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set the server's endpoint and keys in place of all others that the environment may name."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(values)
    RetryingS3.clear_instance_cache()  # one that is open took its keys from the environment
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        RetryingS3.clear_instance_cache()
