"""Passes over whole shards, in their order."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from vavae.data.image import decode_image, prepare_image
from vavae.data.manifest import Manifest, shard_file
from vavae.data.mapped import MappedShard
from vavae.data.stream import image_bytes
from vavae.storage.storage import Storage


class LabelledImages(NamedTuple):
    """Some images and their classes."""

    images: Tensor
    """uint8 [B, 3, H, W]."""
    labels: Tensor
    """int64 [B]."""


def shard_records(path: Path, count: int | None = None) -> Iterator[dict[str, Any]]:
    """Every record of a shard, streamed in order by WebDataset: `__key__`, and extension → bytes.

    Args:
        path: the shard.
        count: records that a manifest promises, where there is one.

    Raises:
        UserError: the shard is damaged or has another count.
    """
    MappedShard(path, count)  # looks through all names: a stream would notice damage only when it gets there
    with path.open("rb") as stream:
        yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))


def read_images(
    storage: Storage, manifest: Manifest, split: str, limit: int, batch_size: int
) -> Iterator[LabelledImages]:
    """The first `limit` images of a split in batches, centre-cropped.

    The shards hold their images in a shuffled order, so the first ones are a fair sample.
    """
    shards = manifest.splits[split]
    records = chain.from_iterable(shard_records(shard_file(storage, split, info), info.count) for info in shards)
    chosen = islice(records, limit)
    while batch := list(islice(chosen, batch_size)):
        yield labelled_images(batch, manifest.image_size)


def labelled_images(records: Iterable[Mapping[str, Any]], size: int | None = None) -> LabelledImages:
    """Decode records of one image size, or cut ADM's centre crop of `size` from each."""
    images, labels = [], []
    for record in records:
        data = image_bytes(record)
        images.append(decode_image(data) if size is None else prepare_image(data, size))
        labels.append(int(record["cls"]))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # [B, H, W, 3] → [B, 3, H, W]
    return LabelledImages(pixels, torch.tensor(labels))


def gather(batches: Iterable[LabelledImages]) -> LabelledImages:
    """All batches as one."""
    images, labels = zip(*batches, strict=True)
    return LabelledImages(torch.cat(images), torch.cat(labels))
