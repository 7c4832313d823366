"""Passes over whole shards, in their order."""

import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from vavae.data.image import decode_image
from vavae.data.manifest import Manifest
from vavae.data.stream import center_crop, image_bytes
from vavae.errors import UserError
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
    number = 0
    try:
        with path.open("rb") as stream:
            members = tar_file_expander([{"url": str(path), "stream": stream}])
            for number, record in enumerate(group_by_keys(members), 1):  # noqa: B007  (counted after the loop)
                yield record
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a readable shard ({error}); make the shards again") from error
    if count not in (None, number):
        raise UserError(f"{path}: {number} records where the manifest says {count}; make the shards again")


def read_images(
    storage: Storage, manifest: Manifest, split: str, limit: int, batch_size: int
) -> Iterator[LabelledImages]:
    """The first `limit` images of a split in batches, centre-cropped.

    The shards hold their images in a shuffled order, so the first ones are a fair sample.
    """
    shards = manifest.splits[split]
    records = chain.from_iterable(
        shard_records(storage.local_file(f"{split}/{info.name}"), info.count) for info in shards
    )
    chosen = islice(records, limit)
    while batch := list(islice(chosen, batch_size)):
        yield labelled_images(batch, manifest.image_size)


def labelled_images(records: Iterable[Mapping[str, bytes]], size: int | None = None) -> LabelledImages:
    """Decode records of one image size, or crop them to `size`."""
    images, labels = [], []
    for record in records:
        image = decode_image(image_bytes(record))
        images.append(image if size is None else center_crop(image, size))
        labels.append(int(record["cls"]))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # [B, H, W, 3] → [B, 3, H, W]
    return LabelledImages(pixels, torch.tensor(labels))


def gather(batches: Iterable[LabelledImages]) -> LabelledImages:
    """All batches as one."""
    images, labels = zip(*batches, strict=True)
    return LabelledImages(torch.cat(images), torch.cat(labels))
