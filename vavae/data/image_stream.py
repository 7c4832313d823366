"""The stream of micro-batches that feeds a training: a map-style dataset over (lane, step), so workers never matter."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vavae.data.config import StreamConfig
from vavae.data.image import UnreadableImage, prepare_image
from vavae.data.prefetch import OrderedShards
from vavae.data.sample_order import Location, SampleOrder
from vavae.data.shards.manifest import Manifest
from vavae.data.shards.mapped_shard import MappedShard, ShardCache
from vavae.errors import UserError
from vavae.randomness import numpy_generator
from vavae.storage.storage import Storage

logger = logging.getLogger(__name__)


class MicroBatchKey(NamedTuple):
    """Key of a micro-batch: the consecutive positions that one lane contributes to one step."""

    lane: int
    step: int


class ImageMicroBatch(NamedTuple):
    """Images of one micro-batch, as they lie in the shards but cropped and flipped."""

    lane: int
    step: int
    images: Tensor
    """Images uint8 [S, 3, H, W]; in memory the channels of a pixel lie together, until floats are made of them."""
    labels: Tensor
    """Classes int64 [S]; all 0 where there are none."""
    unreadable: Sequence[str] = ()
    """Names, `<split>/<shard>#<key>`, of images that could not be read and were replaced by others."""


class _Found(NamedTuple):
    label: int
    unreadable: list[str]


class Quarantine:
    """The unreadable images of a stream, by name, as the training process learns of them.

    Args:
        limit: most unreadable images before the training stops.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.names: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        """Add names, known ones or new.

        Raises:
            UserError: there are more than the limit.
        """
        self.names.update(names)
        if len(self.names) > self._limit:
            raise UserError(
                f"{len(self.names)} unreadable images, such as {min(self.names)}: more than "
                f"stream.unreadable_limit={self._limit}; make the shards again or raise it"
            )


MicroBatchT = TypeVar("MicroBatchT", covariant=True)


class MicroBatchSource(Protocol, Generic[MicroBatchT]):
    """A pure function from a key to a micro-batch."""

    def __getitem__(self, key: MicroBatchKey) -> MicroBatchT:
        """The micro-batch of a lane at a step."""


class ShardStream(Dataset[MicroBatchT]):
    """A map-style dataset of micro-batches made of the records of shards.

    Args:
        shards: the shards to read, and their order.
        micro_batch_bytes: approximate size of one micro-batch in memory.
    """

    def __init__(self, shards: OrderedShards, micro_batch_bytes: int) -> None:
        self.shards, self.micro_batch_bytes = shards, micro_batch_bytes


class ImageStream(ShardStream[ImageMicroBatch]):
    """Micro-batches of one split of image shards.

    Args:
        storage: the folder of the manifest.
        manifest: shards and classes.
        split: `train` or `validation`.
        order: the order of the records.
        micro_batch_size: images of one micro-batch.
        config: crop and flip.
        seed: keys the crops and flips.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        split: str,
        order: SampleOrder,
        micro_batch_size: int,
        config: StreamConfig,
        seed: int,
    ) -> None:
        shards = OrderedShards(storage, split, manifest.splits[split], order, micro_batch_size)
        self._size, self._form, self._reader = manifest.height_and_width, manifest.pixel_format, manifest.reader
        super().__init__(shards, micro_batch_bytes=micro_batch_size * manifest.image_bytes)
        self._config, self._seed = config, seed
        self._open: ShardCache[MappedShard] = ShardCache(config.open_shards)
        self.quarantine = Quarantine(config.unreadable_limit)
        """Unreadable images seen by `load_micro_batches` in this process; a micro-batch depends on its key alone."""

    def __getitem__(self, key: MicroBatchKey) -> ImageMicroBatch:
        rng = numpy_generator(self._seed, "augment", key.lane, key.step)
        locations = self.shards.order.micro_batch(key.lane, key.step, self.shards.micro_batch_size)
        dtype = np.uint8 if self._form.depth == 8 else np.uint16
        pixels = np.empty((len(locations), *self._size, self._form.channels), dtype)
        labels = []
        unreadable: list[str] = []
        for location, image in zip(locations, pixels, strict=True):
            found = self._read_into(image, location, rng)
            labels.append(found.label)
            unreadable += found.unreadable
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # [S, H, W, C] → [S, C, H, W]
        return ImageMicroBatch(key.lane, key.step, images, torch.tensor(labels), tuple(unreadable))

    def _map(self, shard: int) -> MappedShard:
        def open_file(path: Path) -> MappedShard:
            return MappedShard(path, self.shards.infos[shard].count, self.shards.infos[shard].dropped)

        return self.shards.open(shard, open_file)

    def _read_into(self, image: np.ndarray, location: Location, rng: np.random.Generator) -> _Found:
        """Fill in the image at a location, or the next readable one of its shard."""
        shard = self._open.get(location.shard, self._map)
        name = f"{self.shards.split}/{self.shards.infos.name(location.shard)}"
        unreadable: list[str] = []
        for offset in range(len(shard)):
            index = (location.record + offset) % len(shard)
            record, place = shard[index], f"{name}#{shard.key(index)}"
            try:
                data = self._reader.image(record, place)
                pixels = prepare_image(data, self._size, self._config.crop, rng, image, self._form)
                mirrored = self._config.flip and rng.random() < 0.5
                if mirrored or not np.may_share_memory(pixels, image):
                    image[:] = pixels[:, ::-1] if mirrored else pixels
                return _Found(self._reader.label(record, place), unreadable)
            except UnreadableImage as error:
                logger.warning("unreadable image %s, replaced by the next one: %s", place, error)
                unreadable.append(place)
        raise UserError(f"{name}: no readable image in the whole shard")
