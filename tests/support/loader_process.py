"""A training process as far as its loader processes go, and what they are."""

import json
import os
import sys
from collections.abc import Generator
from contextlib import closing, suppress
from typing import Any, NamedTuple

import numpy as np
import psutil

from vavae.data.config import StreamConfig
from vavae.data.image_stream import ImageStream, MicroBatchKey, MicroBatchSource
from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import assign_lanes, order_of
from vavae.data.shards.manifest import ShardInfo
from vavae.latents.manifest import LatentManifest
from vavae.latents.shards import write_latents
from vavae.latents.stream import LatentStream
from vavae.storage.storage import Storage, sha256_of

from .image_shards import write_image_shards

COUNT, SHAPE = 12, (4, 2, 2)
STREAM = StreamConfig(lanes=2, workers=1)


class Reader(NamedTuple):
    """The process that has made a micro-batch."""

    process: int
    modules: list[str]
    """Packages that it has imported."""


class Inspected:
    """A source that makes the micro-batches of another, and yields who has."""

    def __init__(self, source: MicroBatchSource[Any]) -> None:
        self._source = source

    def __getitem__(self, key: MicroBatchKey) -> Reader:
        """See `MicroBatchSource`."""
        self._source[key]
        return Reader(os.getpid(), sorted({name.partition(".")[0] for name in sys.modules}))


def image_stream(storage: Storage) -> ImageStream:
    """A stream of a shard of images."""
    manifest = write_image_shards(storage, {"train": (COUNT,)})
    return ImageStream(storage, manifest, "train", order_of((COUNT,), 0, STREAM), 2, STREAM, 0)


def latent_stream(storage: Storage) -> LatentStream:
    """A stream of a shard of latents."""
    with storage.create("train/000000.tar") as path:
        write_latents(path, np.ones((COUNT, 2, *SHAPE), np.float16), [0] * COUNT, first_index=0)
        info = ShardInfo(name="000000.tar", count=COUNT, bytes=path.stat().st_size, sha256=sha256_of(path))
    manifest = LatentManifest(tokenizer="t", shape=SHAPE, flip=False, classes=("a",), splits={"train": (info,)})
    return LatentStream(storage, manifest, "train", order_of((COUNT,), 0, STREAM), 2, 0, open_shards=1)


def readers(source: MicroBatchSource[Any]) -> Generator[list[Reader], None, None]:
    """The loader processes that make the micro-batches of each step."""
    return load_micro_batches(Inspected(source), assign_lanes(STREAM.lanes, 0, 1), 0, STREAM.workers)


def stay_in_training() -> None:
    """Load images and latents in folders below the working directory, tell of the loader processes, and wait."""
    found = {}
    with (
        closing(readers(image_stream(Storage("images")))) as images,
        closing(readers(latent_stream(Storage("latents")))) as latents,
    ):
        for name, stream in (("images", images), ("latents", latents)):
            *_, reader = next(stream)
            process = psutil.Process(reader.process)
            resident = [each.memory_info().rss / 2**20 for each in (process, process.parent())]
            found[name] = {**reader._asdict(), "server": process.ppid(), "resident": resident}
        print(json.dumps(found), flush=True)
        sys.stdin.read()


def is_alive(process: int) -> bool:
    """Return whether a process has not ended yet; one that nobody has reaped has."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    return False
