"""Baselines, used as their documentation shows: WebDataset, and LitData and MosaicML Streaming where installed."""

import importlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from vavae.bench.benchmark import installed_version
from vavae.bench.data.shards import BATCH

_CHUNK = 64 << 20

T = TypeVar("T")


class Baseline(NamedTuple):
    """Another reader of the same images."""

    name: str
    records: Callable[[], Iterator[bytes]]
    """Encoded images, in order."""
    batches: Callable[[], Iterator[Tensor]]
    """Decoded images, uint8 [B, 3, H, W]."""


def baselines(tar: Path, files: Sequence[bytes], folder: Path) -> list[Baseline]:
    """Baselines that are installed here.

    Args:
        tar: the images as a shard.
        files: the images.
        folder: for copies of them in the formats of the baselines.
    """
    found = [_webdataset(tar)]
    if installed_version("litdata"):
        found.append(_litdata(files, folder / "litdata"))
    if installed_version("mosaicml-streaming"):
        found.append(_mosaicml(files, folder / "mosaicml"))
    return found


def _webdataset(tar: Path) -> Baseline:
    def samples() -> Iterator[dict[str, Any]]:
        return iter(webdataset.WebDataset(str(tar), shardshuffle=False))

    return Baseline("webdataset", lambda: (sample["jpg"] for sample in samples()), lambda: _decoded(samples()))


def _litdata(files: Sequence[bytes], folder: Path) -> Baseline:
    importlib.import_module("vavae.torchvision_compat")  # LitData imports torchvision
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=_CHUNK)
    for index, data in enumerate(files):
        writer[index] = {"jpg": data}
    writer.done()
    writer.merge()
    return _through_pillow("LitData", StreamingDataset(str(folder), shuffle=False))


def _mosaicml(files: Sequence[bytes], folder: Path) -> Baseline:
    importlib.import_module("vavae.torchvision_compat")  # so does Streaming
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder), columns={"jpg": "bytes"}, size_limit=_CHUNK) as writer:
        for data in files:
            writer.write({"jpg": data})
    return _through_pillow("MosaicML Streaming", StreamingDataset(local=str(folder), shuffle=False, batch_size=BATCH))


def _through_pillow(name: str, dataset: Iterable[dict[str, Any]]) -> Baseline:
    """Baseline that leaves decoding to Pillow, as WebDataset does."""

    def records() -> Iterator[bytes]:
        return (bytes(sample["jpg"]) for sample in dataset)

    def batches() -> Iterator[Tensor]:
        for batch in in_batches(records()):
            yield _stacked([np.asarray(Image.open(io.BytesIO(data))) for data in batch])

    return Baseline(name, records, batches)


def streamed_batches(bodies: Iterable[io.BufferedIOBase]) -> Iterator[Tensor]:
    """Batches of images that WebDataset reads from tars as they stream in, uint8 [B, 3, H, W]."""
    return _decoded(group_by_keys(tar_file_expander({"url": "", "stream": body} for body in bodies)))


def latent_batches(tar: Path) -> Iterator[Tensor]:
    """Batches of latents that WebDataset reads, float32 [B, C, H, W]: means; deviations and labels are read, too."""
    for samples in in_batches(webdataset.WebDataset(str(tar), shardshuffle=False)):
        arrays = [np.load(io.BytesIO(sample["latent.npy"])) for sample in samples]
        torch.tensor([int(sample["cls"]) for sample in samples])
        yield torch.from_numpy(np.stack(arrays)).float()[:, 0]


def _decoded(samples: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
    """Batches decoded by WebDataset, through Pillow."""
    for batch in in_batches(webdataset.decode("rgb8")(samples)):
        yield _stacked([sample["jpg"] for sample in batch])


def _stacked(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # [B, H, W, 3] → [B, 3, H, W]


def in_batches(items: Iterable[T]) -> Iterator[list[T]]:
    """Lists of 32 items, the last one shorter where they don't come out even."""
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch
