"""The stream of slices that feeds a training run: a map-style dataset over (lane, step), so workers never matter."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vavae.data.config import StreamConfig
from vavae.data.image import UnreadableImage, prepare_image
from vavae.data.manifest import Manifest, shard_file
from vavae.data.mapped import MappedShard, ShardCache
from vavae.data.order import Location, Round, SampleOrder
from vavae.errors import UserError
from vavae.randomness import numpy_generator
from vavae.storage.storage import Storage

logger = logging.getLogger(__name__)


class SliceKey(NamedTuple):
    """Which slice: the consecutive positions that one lane contributes to one step."""

    lane: int
    step: int


class ImageSlice(NamedTuple):
    """Images of one slice, as they lie in the shards but cropped and flipped."""

    lane: int
    step: int
    images: Tensor
    """uint8 [S, 3, H, W]."""
    labels: Tensor
    """int64 [S]."""
    unreadable: Sequence[str] = ()
    """Images that could not be read and had others stand in for them: `<split>/<shard>#<key>`."""


class _Found(NamedTuple):
    pixels: np.ndarray
    label: int
    unreadable: list[str]


class Quarantine:
    """The unreadable images of a stream, by name, as the training process learns of them.

    Args:
        limit: how many are borne.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.names: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        """Take names in, known ones or new.

        Raises:
            UserError: there are more than the limit.
        """
        self.names.update(names)
        if len(self.names) > self._limit:
            raise UserError(
                f"{len(self.names)} unreadable images, such as {min(self.names)}: more than "
                f"stream.unreadable_limit={self._limit}; make the shards again or raise it"
            )


SliceT = TypeVar("SliceT", covariant=True)


class SliceSource(Protocol, Generic[SliceT]):
    """A pure function from a key to a slice."""

    def __getitem__(self, key: SliceKey) -> SliceT:
        """The slice of a lane at a step."""


class ImageStream(Dataset[ImageSlice]):
    """Slices of one split of image shards.

    Args:
        storage: where the manifest's shards lie.
        manifest: what there is.
        split: `train` or `validation`.
        order: which record comes where.
        slice_size: images of one slice.
        config: crop and flip.
        seed: keys the crops and flips.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        split: str,
        order: SampleOrder,
        slice_size: int,
        config: StreamConfig,
        seed: int,
    ) -> None:
        self._storage, self._split, self._order, self._size = storage, split, order, slice_size
        self._shards = manifest.splits[split]
        self._image_size, self._classes = manifest.image_size, len(manifest.classes)
        self._config, self._seed = config, seed
        self._open: ShardCache[MappedShard] = ShardCache(config.open_shards)
        self.quarantine = Quarantine(config.unreadable_limit)
        """What `load_slices` met in this process; the slices themselves stay functions of their keys."""

    def __getitem__(self, key: SliceKey) -> ImageSlice:
        random = numpy_generator(self._seed, "augment", key.lane, key.step)
        locations = self._order.slice(key.lane, key.step, self._size)
        images, labels = [], []
        unreadable: list[str] = []
        for location in locations:
            found = self._read(location, random)
            images.append(found.pixels)
            labels.append(found.label)
            unreadable += found.unreadable
        batch = np.stack(images).transpose(0, 3, 1, 2)  # [S, H, W, 3] → [S, 3, H, W]
        pixels = torch.from_numpy(np.ascontiguousarray(batch))
        return ImageSlice(key.lane, key.step, pixels, torch.tensor(labels), tuple(unreadable))

    def _map(self, shard: int) -> MappedShard:
        info = self._shards[shard]
        return MappedShard(shard_file(self._storage, self._split, info), info.count)

    def _read(self, location: Location, random: np.random.Generator) -> _Found:
        """The image at a location, or the next readable one of its shard."""
        shard, name = self._open.get(location.shard, self._map), self._shards[location.shard].name
        unreadable: list[str] = []
        for offset in range(len(shard)):
            index = (location.record + offset) % len(shard)
            record, place = shard[index], f"{self._split}/{name}#{shard.key(index)}"
            try:
                pixels = prepare_image(image_bytes(record, place), self._image_size, self._config.crop, random)
                if self._config.flip and random.random() < 0.5:
                    pixels = pixels[:, ::-1]
                return _Found(pixels, label_of(record, self._classes, place), unreadable)
            except UnreadableImage as error:
                logger.warning("unreadable image %s, the next one stands in: %s", place, error)
                unreadable.append(place)
        raise UserError(f"{self._split}/{name}: no readable image in the whole shard")


def label_of(record: Mapping[str, bytes], classes: int, place: str) -> int:
    """The class of a record, an index; UserError with its place where there is none, or one beyond the classes."""
    text = record.get("cls", b"")
    if not text.strip().isdigit():
        raise UserError(f"{place}: its class is {text[:20]!r}; expected a member cls with 0 to {classes - 1}")
    if int(text) >= classes:
        raise UserError(f"{place}: label {int(text)}, but the manifest has {classes} classes; make the shards again")
    return int(text)


IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")


def image_bytes(record: Mapping[str, bytes], place: str = "a record") -> bytes:
    """The encoded image among a record's members; UserError with its place where there is none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in record:
            return record[extension]
    raise UserError(f"{place}: without an image: its members are {sorted(record)}; expected png, jpg, jpeg or webp")


class _Keys(Sampler[SliceKey]):
    """The keys of one rank from a step on, for ever: every round of a step, then the next step."""

    def __init__(self, rounds: Sequence[Round], first_step: int) -> None:
        self._rounds, self._first = rounds, first_step

    def __iter__(self) -> Iterator[SliceKey]:
        for step in count(self._first):
            for turn in self._rounds:
                yield SliceKey(turn.lane, step)


def load_slices(
    source: SliceSource[SliceT], rounds: Sequence[Round], first_step: int, workers: int, pin_memory: bool = False
) -> Iterator[list[SliceT]]:
    """Lists of the slices of one rank, one list per step from `first_step` on, one slice per round.

    Args:
        source: makes a slice from its key.
        rounds: the lanes of this rank.
        first_step: the step to begin with.
        workers: loader processes; 0 makes slices in the training process. Their number never changes a slice.
        pin_memory: for copies to a GPU that do not block.

    Raises:
        UserError: as the source does, in whatever process; more images are unreadable than their stream allows.
    """
    loader: DataLoader[SliceT | _Refusal] = DataLoader(
        _Refusing(source),
        sampler=_Keys(rounds, first_step),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        pin_memory=pin_memory,
    )
    slices = iter(loader)
    while True:
        yield [_received(source, next(slices)) for _ in rounds]


class _Refusal(NamedTuple):
    message: str


class _Refusing(Dataset[Any]):
    """A source whose errors of users come back as values: a loader process would add its traceback to them."""

    def __init__(self, source: SliceSource[Any]) -> None:
        self._source = source

    def __getitem__(self, key: SliceKey) -> Any:
        try:
            return self._source[key]
        except UserError as error:
            return _Refusal(str(error))


def _received(source: SliceSource[SliceT], item: SliceT | _Refusal) -> SliceT:
    if isinstance(item, _Refusal):
        raise UserError(item.message)
    if isinstance(source, ImageStream) and isinstance(item, ImageSlice):
        source.quarantine.add(item.unreadable)
    return item
