"""Sequential readers of whole shards, in their order."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from vavae.data.ahead import map_ahead
from vavae.data.config import RGB, PixelFormat
from vavae.data.image import UnreadableImage, decode_image, prepare_image
from vavae.data.record import LABEL, caption_of, find_image, name_of
from vavae.data.shards.manifest import Manifest, ShardInfo, open_shard
from vavae.data.shards.mapped_shard import MappedShard
from vavae.errors import UserError
from vavae.storage.storage import Storage

_log = logging.getLogger(__name__)


class LabeledImages(NamedTuple):
    """A batch of images and their classes."""

    images: Tensor
    """Images uint8 [B, 3, H, W]."""
    labels: Tensor
    """Classes int64 [B]; all 0 where there are none."""


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


class ShardRecord(NamedTuple):
    """A record of an open image shard."""

    shard: MappedShard
    record: int
    """Position in the shard."""
    place: str
    """Name for messages, `<split>/<shard>#<key>`."""


class ReadableImage(NamedTuple):
    """An image that could be read."""

    pixels: np.ndarray
    """uint8 [S, S, 3]."""
    label: int
    key: str
    """Name of the image, as its source calls it."""
    caption: str | None = None
    """Text on the image, where its record has one."""


class _UnreadableImage(NamedTuple):
    record: int
    key: str
    place: str
    reason: str


class ReadableImages:
    """The readable images among some records, in their order, decoded in threads ahead of their use.

    In memory are at most `ahead` images, and those that their user holds. Those that are left out are logged.

    Args:
        records: records of image shards.
        manifest: size and classes of the images.
        ahead: images that are decoded in advance.
        threads: threads that decode; their number changes nothing.
    """

    def __init__(self, records: Iterable[ShardRecord], manifest: Manifest, ahead: int, threads: int = 1) -> None:
        self._records, self._ahead, self._threads = records, ahead, threads
        self._size, self._form, self._reader = manifest.height_and_width, manifest.pixel_format, manifest.reader
        self.skipped: list[str] = []
        """Names of the images that were left out so far."""
        self.skipped_records: list[int] = []
        """Positions of their records in their shard, among those that its manifest counts."""

    def __iter__(self) -> Iterator[ReadableImage]:
        for image in map_ahead(self._read, self._records, self._ahead, self._threads):
            if isinstance(image, _UnreadableImage):
                _log.warning("%s: left out %s: %s", image.place, image.key, image.reason)
                self.skipped.append(image.key)
                self.skipped_records.append(image.record)
            else:
                yield image

    def _read(self, at: ShardRecord) -> ReadableImage | _UnreadableImage:
        record = at.shard[at.record]
        key = name_of(record, at.shard.key(at.record))
        try:
            pixels = prepare_image(self._reader.image(record, at.place), self._size, form=self._form)
        except UnreadableImage as error:
            return _UnreadableImage(at.record, key, at.place, str(error))
        return ReadableImage(pixels, self._reader.label(record, at.place), key, caption_of(record))


def open_records(storage: Storage, split: str, info: ShardInfo, within: range | None = None) -> Iterator[ShardRecord]:
    """Open a shard and yield its records, or those at some positions.

    Args:
        storage: folder of the manifest.
        split: split of the shard.
        info: its entry in the manifest.
        within: positions; None takes all.

    Raises:
        UserError: the shard is damaged, or another than the manifest says.
    """
    shard = open_shard(storage, split, info, lambda path: MappedShard(path, info.count, info.dropped))
    for record in range(info.count) if within is None else within:
        yield ShardRecord(shard, record, f"{split}/{info.name}#{shard.key(record)}")


def read_images(
    storage: Storage, manifest: Manifest, split: str, limit: int, batch_size: int, threads: int = 1
) -> Iterator[LabeledImages]:
    """Yield the first `limit` readable images of a split in batches, center-cropped; those left out are logged.

    The shards hold their images in a shuffled order, so the first ones are a fair sample. A batch is decoded while the
    one before it is used.

    Args:
        storage: folder of the shards.
        manifest: its manifest.
        split: name of the split.
        limit: images to read at most.
        batch_size: images of a batch; the last one may be smaller.
        threads: threads that decode; their number changes nothing.

    Raises:
        UserError: a shard is damaged, a class is none of the manifest's, or no image can be read.
    """
    records = chain.from_iterable(open_records(storage, split, info) for info in manifest.splits[split])
    chosen = islice(ReadableImages(records, manifest, batch_size, threads), limit)
    found = False
    for batch in batched(chosen, batch_size):
        yield _batch(batch)
        found = True
    if not found:
        raise UserError(f"{storage.url(split)}: no readable image in all its shards; make the shards again")


def read_span(
    storage: Storage, manifest: Manifest, split: str, span: range, batch_size: int, threads: int = 1
) -> Iterator[LabeledImages]:
    """Yield the readable images among some records of a split, counted through its shards, as :func:`read_images`.

    Raises:
        UserError: a shard is damaged, or a class is none of the manifest's.
    """
    infos = manifest.splits[split]
    firsts = accumulate((info.count for info in infos), initial=0)
    records = chain.from_iterable(
        open_records(storage, split, info, range(max(0, span.start - first), min(info.count, span.stop - first)))
        for info, first in zip(infos, firsts, strict=False)
        if first < span.stop and first + info.count > span.start
    )
    yield from map(_batch, batched(ReadableImages(records, manifest, batch_size, threads), batch_size))


def labeled_images(records: Iterable[Mapping[str, Any]], threads: int = 1, form: PixelFormat = RGB) -> LabeledImages:
    """Decode records that this package wrote, of one image size, into one batch; see :func:`labeled_batches`."""
    return _batch(list(map_ahead(partial(_read_sample, form=form), records, 2 * threads, threads)))


def labeled_batches(
    records: Iterable[Mapping[str, Any]], batch_size: int, threads: int = 1, form: PixelFormat = RGB
) -> Iterator[LabeledImages]:
    """Decode records that this package wrote, of one image size, each batch while the one before it is used.

    Args:
        records: members by extension, and the name as `__key__`.
        batch_size: images of a batch; the last one may be smaller.
        threads: threads that decode; their number changes nothing.
        form: channels and depth of the images.
    """
    return map(_batch, batched(map_ahead(partial(_read_sample, form=form), records, batch_size, threads), batch_size))


def batched(images: Iterable[ReadableImage], batch_size: int) -> Iterator[list[ReadableImage]]:
    """Split images into batches, full but for the last."""
    rest = iter(images)
    while batch := list(islice(rest, batch_size)):
        yield batch


def _read_sample(record: Mapping[str, Any], form: PixelFormat) -> ReadableImage:
    return ReadableImage(decode_image(record[find_image(record)], form=form), int(record[LABEL]), record["__key__"])


def _batch(samples: Sequence[ReadableImage]) -> LabeledImages:
    pixels = (
        torch.from_numpy(np.stack([sample.pixels for sample in samples])).permute(0, 3, 1, 2).contiguous()
    )  # [B, H, W, C] → [B, C, H, W]
    return LabeledImages(pixels, torch.tensor([sample.label for sample in samples]))


def gather(batches: Iterable[LabeledImages]) -> LabeledImages:
    """Concatenate all batches into one."""
    images, labels = zip(*batches, strict=True)
    return LabeledImages(torch.cat(images), torch.cat(labels))
