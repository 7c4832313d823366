"""``vavae bench data``: our readers beside plain WebDataset pipelines, in turns in one process, on equal outputs."""

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from vavae.data.config import StreamConfig
from vavae.data.image import decode_image, encode_image
from vavae.data.latents import LatentManifest, LatentStream, write_latents
from vavae.data.manifest import Manifest, ShardInfo
from vavae.data.mapped import MappedShard
from vavae.data.order import SampleOrder, order_of
from vavae.data.stream import ImageStream, SliceKey
from vavae.data.tar import write_tar
from vavae.randomness import numpy_generator
from vavae.storage.storage import Storage, sha256_of

IMAGES, LATENTS = 1536, 1024
_SIDE, _SHAPE, _BATCH, _DISTINCT, _QUALITY = 256, (32, 16, 16), 32, 64, 90
_REFERENCE, _OURS = "webdataset", "vavae"


class Result(NamedTuple):
    """Samples per second of processor time, the median over the rounds, and the ratio of each round."""

    name: str
    rates: dict[str, float]
    ratios: list[float]


def run(rounds: int, images: int = IMAGES, latents: int = LATENTS) -> Iterator[Result]:
    """Go through the contests; each is the work of one core, from page cache.

    Args:
        rounds: how often each side has its turn.
        images: of 256 x 256 pixels in the shard of images.
        latents: in the shard of latents, 32 x 16 x 16 each.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="vavae-") as folder:
            storage = Storage(folder)
            for name, sides in _contests(storage, _write_images(storage, images), _write_latents(storage, latents)):
                yield _compete(name, sides, rounds)
    finally:
        torch.set_num_threads(threads)


def _compete(name: str, sides: Mapping[str, Callable[[], int]], rounds: int) -> Result:
    for warm_up in sides.values():
        warm_up()
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, work in sides.items():
            start = time.process_time()
            count = work()
            rates[side].append(count / (time.process_time() - start))
    ratios = [ours / theirs for ours, theirs in zip(rates[_OURS], next(iter(rates.values())), strict=True)]
    return Result(name, {side: statistics.median(found) for side, found in rates.items()}, ratios)


def _contests(
    storage: Storage, images: Manifest, latents: LatentManifest
) -> Iterator[tuple[str, dict[str, Callable[[], int]]]]:
    """Name of a contest, and its sides, the reference first; each returns how many samples it went through."""
    (shard,), (latent_shard,) = images.splits["train"], latents.splits["train"]
    tar, latent_tar = (storage.local_file(f"train/{info.name}") for info in (shard, latent_shard))
    files = [record["jpg"] for record in _plain(tar)]
    mapped = MappedShard(tar, shard.count)
    assert [mapped[index]["jpg"] for index in range(len(mapped))] == files, "both readers find the same records"

    config = StreamConfig(lanes=1, crop="center")
    order, latent_order = (order_of([info.count], 0, config) for info in (shard, latent_shard))
    stream = ImageStream(storage, images, "train", order, _BATCH, config, 0)
    batches = shard.count // _BATCH
    theirs = torch.cat(list(_image_batches(tar)))[_rows(order, batches)]
    ours = torch.cat([stream[SliceKey(0, step)].images for step in range(batches)])
    assert torch.equal(ours, theirs), "both pipelines decode the same pixels"
    latent_stream = LatentStream(storage, latents, "train", latent_order, _BATCH, seed=0, open_shards=1)
    latent_batches = latent_shard.count // _BATCH
    means = torch.cat(list(_latent_batches(latent_tar)))
    found = torch.cat([latent_stream[SliceKey(0, step)].mean for step in range(latent_batches)])
    assert torch.equal(found, means[_rows(latent_order, latent_batches)]), "both pipelines read the same latents"

    yield "tar records", {_REFERENCE: lambda: sum(1 for _ in _plain(tar)), _OURS: lambda: sum(1 for _ in _records(tar))}
    yield (
        "JPEG batches",
        {
            _REFERENCE: lambda: sum(len(batch) for batch in _image_batches(tar)),
            _OURS: lambda: _slices(stream, batches),
        },
    )
    yield (
        "JPEG batches beside the bare decoder",
        {"decoder": lambda: len([decode_image(data) for data in files]), _OURS: lambda: _slices(stream, batches)},
    )
    yield (
        "latent batches",
        {
            _REFERENCE: lambda: sum(len(batch) for batch in _latent_batches(latent_tar)),
            _OURS: lambda: _slices(latent_stream, latent_batches),
        },
    )


def _rows(order: SampleOrder, batches: int) -> list[int]:
    """Places in the shard of the records that a stream gives."""
    return [location.record for step in range(batches) for location in order.slice(0, step, _BATCH)]


def _records(tar: Path) -> Iterator[Mapping[str, bytes]]:
    shard = MappedShard(tar)
    return (shard[index] for index in range(len(shard)))


def _slices(stream: ImageStream | LatentStream, count: int) -> int:
    return sum(len(stream[SliceKey(0, step)].labels) for step in range(count))


def _plain(tar: Path) -> Iterator[dict[str, bytes]]:
    return iter(webdataset.WebDataset(str(tar), shardshuffle=False))


def _image_batches(tar: Path) -> Iterator[Tensor]:
    """uint8 [B, 3, H, W], decoded by WebDataset through Pillow."""
    samples = iter(webdataset.WebDataset(str(tar), shardshuffle=False).decode("rgb8"))
    while batch := list(islice(samples, _BATCH)):
        yield torch.from_numpy(np.stack([sample["jpg"] for sample in batch])).permute(0, 3, 1, 2).contiguous()


def _latent_batches(tar: Path) -> Iterator[Tensor]:
    """float32 [B, C, H, W], means and deviations as WebDataset hands them out."""
    samples = _plain(tar)
    while batch := list(islice(samples, _BATCH)):
        arrays = [np.load(io.BytesIO(sample["latent.npy"])) for sample in batch]
        torch.tensor([int(sample["cls"]) for sample in batch])
        yield torch.from_numpy(np.stack(arrays)).float()[:, 0]


def _write_images(storage: Storage, count: int) -> Manifest:
    """A shard of smooth noise with grain, about as large as photographs."""
    random = numpy_generator(0, "bench")
    files = []
    for _ in range(_DISTINCT):
        coarse = Image.fromarray(random.integers(0, 256, (_SIDE // 8, _SIDE // 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), np.int64)
        grainy = (smooth + random.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        files.append(encode_image(Image.fromarray(grainy), "jpeg", _QUALITY).data)
    with storage.create("train/images.tar") as local:
        with write_tar(local) as tar:
            for index in range(count):
                tar.add(index, {"jpg": files[index % _DISTINCT], "cls": b"%d" % (index % 10)})
        info = _describe(local, "images.tar", count)
    classes = tuple(str(label) for label in range(10))
    return Manifest(splits={"train": (info,)}, classes=classes, image_size=_SIDE, sources={})


def _write_latents(storage: Storage, count: int) -> LatentManifest:
    arrays = numpy_generator(0, "bench").standard_normal((count, 2, *_SHAPE), np.float32).astype(np.float16)
    with storage.create("train/latents.tar") as local:
        write_latents(local, arrays, [index % 10 for index in range(count)], 0)
        info = _describe(local, "latents.tar", count)
    classes = tuple(str(label) for label in range(10))
    return LatentManifest(tokenizer="", shape=_SHAPE, flip=False, classes=classes, splits={"train": (info,)})


def _describe(local: Path, name: str, count: int) -> ShardInfo:
    return ShardInfo(name=name, count=count, bytes=local.stat().st_size, sha256=sha256_of(local))
