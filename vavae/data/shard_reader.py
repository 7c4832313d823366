"""Sequential readers of whole shards, in their order."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from vavae.data.image import UnreadableImage, decode_image, prepare_image
from vavae.data.image_stream import image_bytes, label_of
from vavae.data.shards.manifest import Manifest, ShardInfo, shard_file
from vavae.data.shards.mapped_shard import MappedShard
from vavae.errors import UserError
from vavae.storage.storage import Storage

_log = logging.getLogger(__name__)


class LabeledImages(NamedTuple):
    """A batch of images and their classes."""

    images: Tensor
    """Images uint8 [B, 3, H, W]."""
    labels: Tensor
    """Classes int64 [B]."""


def shard_records(
    path: Path, count: int | None = None, dropped: Collection[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield every record of a shard, streamed in order by WebDataset: `__key__`, and extension → bytes.

    Args:
        path: the shard.
        count: records that a manifest promises, where there is one.
        dropped: positions of records that it leaves out.

    Raises:
        UserError: the shard is damaged or has another count.
    """
    MappedShard(path, count, dropped)  # looks through all names: a stream would notice damage only when it gets there
    with path.open("rb") as stream:
        records = group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
        yield from (record for at, record in enumerate(records) if at not in (dropped or ()))


def read_images(
    storage: Storage, manifest: Manifest, split: str, limit: int, batch_size: int
) -> Iterator[LabeledImages]:
    """Yield the first `limit` readable images of a split in batches, center-cropped; those left out are logged.

    The shards hold their images in a shuffled order, so the first ones are a fair sample.

    Raises:
        UserError: a shard is damaged, a class is none of the manifest's, or no image can be read.
    """
    samples = chain.from_iterable(
        _samples(storage, manifest, split, info, range(info.count)) for info in manifest.splits[split]
    )
    chosen, found = islice(samples, limit), False
    while batch := list(islice(chosen, batch_size)):
        yield _batch(batch)
        found = True
    if not found:
        raise UserError(f"{storage.url(split)}: no readable image in all its shards; make the shards again")


def read_span(
    storage: Storage, manifest: Manifest, split: str, span: range, batch_size: int
) -> Iterator[LabeledImages]:
    """Yield the readable images among some records of a split, counted through its shards, as :func:`read_images`.

    Raises:
        UserError: a shard is damaged, or a class is none of the manifest's.
    """
    infos = manifest.splits[split]
    firsts = accumulate((info.count for info in infos), initial=0)
    samples = chain.from_iterable(
        _samples(storage, manifest, split, info, range(max(0, span.start - first), min(info.count, span.stop - first)))
        for info, first in zip(infos, firsts, strict=False)
        if first < span.stop and first + info.count > span.start
    )
    while batch := list(islice(samples, batch_size)):
        yield _batch(batch)


def _samples(
    storage: Storage, manifest: Manifest, split: str, info: ShardInfo, within: range
) -> Iterator[tuple[np.ndarray, int]]:
    records = shard_records(shard_file(storage, split, info), info.count, info.dropped)
    for record in islice(records, within.start, within.stop):
        place = f"{split}/{info.name}#{record['__key__']}"
        try:
            pixels = prepare_image(image_bytes(record, place), manifest.image_size)
        except UnreadableImage as error:
            _log.warning("%s: left out: %s", place, error)
        else:
            yield pixels, label_of(record, len(manifest.classes), place)


def labeled_images(records: Iterable[Mapping[str, Any]]) -> LabeledImages:
    """Decode records that this package wrote, of one image size, into one batch."""
    return _batch([(decode_image(image_bytes(record)), int(record["cls"])) for record in records])


def _batch(samples: Sequence[tuple[np.ndarray, int]]) -> LabeledImages:
    images, labels = zip(*samples, strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # [B, H, W, 3] → [B, 3, H, W]
    return LabeledImages(pixels, torch.tensor(labels))


def gather(batches: Iterable[LabeledImages]) -> LabeledImages:
    """Concatenate all batches into one."""
    images, labels = zip(*batches, strict=True)
    return LabeledImages(torch.cat(images), torch.cat(labels))
