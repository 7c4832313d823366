"""The manifest of a set of image shards: written beside them, read by everything that streams them."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, overload

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    JsonValue,
    SerializationInfo,
    ValidationError,
    with_config,
)
from pydantic_core import CoreSchema, core_schema
from typing_extensions import NotRequired, TypedDict

from vavae.config import digest, height_and_width
from vavae.data.config import RGB, PixelFormat, RecordKeys
from vavae.data.exclusions import Exclusion, exclusion, in_words
from vavae.data.record import RecordReader
from vavae.errors import UserError
from vavae.storage.storage import Storage, sha256_of

MANIFEST = "manifest.json"
_OPENINGS = 5

T = TypeVar("T")


class ShardInfo(BaseModel):
    """One shard of a split; it lies at `<split>/<name>` unless it has a URL of its own.

    Where its records begin is not listed: whoever opens a shard reads all of it to check it, and then finds the 2,000
    beginnings in 15 ms. A list of ImageNet's would be 15 MB that every process parses before its first image.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    count: int
    """Number of its images that are used."""
    bytes: int
    sha256: str
    url: str | None = None
    """Address of a shard that others made; None for one beside the manifest."""
    dropped: tuple[int, ...] | None = None
    """Positions of records that are left out, and not counted, because their images cannot be read."""

    def without(self, records: Collection[int]) -> "ShardInfo":
        """The shard less some of the records that it counts, by their positions among these."""
        if not records:
            return self
        before = {*(self.dropped or ())}
        counted = [at for at in range(self.count + len(before)) if at not in before]
        dropped = sorted(before | {counted[record] for record in records})
        return self.model_copy(update={"count": self.count - len(records), "dropped": tuple(dropped)})


_Size = Annotated[int, Field(ge=0, lt=2**63)]


@with_config(ConfigDict(extra="forbid"))
class _Entry(TypedDict):
    """Fields of a `ShardInfo` as they lie in the file, without an object that would live for a moment."""

    name: str
    count: _Size
    bytes: _Size
    sha256: str
    url: NotRequired[str | None]
    dropped: NotRequired[tuple[int, ...] | None]


class ShardList(Sequence[ShardInfo]):
    """The shards of a split in order, kept as columns: an element is made when it is asked for.

    A hundred thousand take an eighth of the memory of as many objects, and next to no time to pickle, which happens for
    every rank and loader process. In a manifest's file they are a list of objects.

    Args:
        entries: fields of the shards.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self._names = _texts(entry["name"] for entry in entries)
        self._checksums = _texts(entry["sha256"] for entry in entries)
        self._urls = _texts(entry.get("url") or "" for entry in entries)
        dropped = ((at, entry.get("dropped")) for at, entry in enumerate(entries))
        self._dropped = {at: positions for at, positions in dropped if positions is not None}
        self.counts = np.array([entry["count"] for entry in entries], np.int64)
        """Number of images that are used, int64 [N]."""
        self.sizes = np.array([entry["bytes"] for entry in entries], np.int64)
        """Bytes, int64 [N]."""

    @classmethod
    def of(cls, infos: Iterable[ShardInfo]) -> "ShardList":
        """The list of some shards."""
        return cls([dict(info) for info in infos])

    @property
    def has_urls(self) -> bool:
        """Return whether a shard has a URL of its own."""
        return bool((self._urls != b"").any())

    def __len__(self) -> int:
        return len(self.counts)

    @overload
    def __getitem__(self, index: int) -> ShardInfo: ...

    @overload
    def __getitem__(self, index: slice) -> "ShardList": ...

    def __getitem__(self, index: int | slice) -> "ShardInfo | ShardList":
        if isinstance(index, slice):
            return ShardList.of(self[at] for at in range(len(self))[index])
        at = range(len(self))[index]
        return ShardInfo(
            name=self._names[at].decode(),
            count=int(self.counts[at]),
            bytes=int(self.sizes[at]),
            sha256=self._checksums[at].decode(),
            url=self._urls[at].decode() or None,
            dropped=self._dropped.get(at),
        )

    def name(self, index: int) -> str:
        """Name of a shard, which is asked for with every image, without the rest of its entry."""
        return self._names[index].decode()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardList) and [*self] == [*other]

    def __repr__(self) -> str:
        return f"ShardList({len(self)} shards)"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        of_infos = core_schema.no_info_after_validator_function(cls.of, handler(tuple[ShardInfo, ...]))
        return core_schema.json_or_python_schema(
            json_schema=core_schema.no_info_after_validator_function(cls, handler(list[_Entry])),
            python_schema=core_schema.union_schema([core_schema.is_instance_schema(cls), of_infos]),
            serialization=core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True),
        )


def _texts(values: Iterable[str]) -> np.ndarray:
    """Texts in UTF-8, bytes [N] of one width; none ends in a zero byte, as no name of a file does."""
    return np.array([value.encode() for value in values], np.bytes_)


def _dump(infos: Iterable[ShardInfo], how: SerializationInfo) -> list[dict[str, Any]]:
    return [info.model_dump(mode=how.mode, exclude_none=how.exclude_none) for info in infos]


class Manifest(BaseModel):
    """Shards, classes and provenance."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    splits: dict[str, ShardList]
    """Shards by split (`train`, `validation`), in order."""

    classes: tuple[str, ...]
    """Names of the classes; an image's label is an index into them. None: the records have no labels."""

    image_size: int | tuple[int, int]
    """Side in pixels, or height and width, of the images that training sees; others are scaled and cut."""

    sources: dict[str, dict[str, JsonValue]]
    """Fingerprints of what the shards were made from, by split."""

    skipped: tuple[str, ...] = ()
    """Names of the first images that could not be read."""

    skipped_count: int = 0
    """Number of images that could not be read."""

    excluded: tuple[Exclusion, ...] | None = None
    """Files and images of the sources that are in no shard, by the reason, and classes without an image."""

    image_key: str | None = None
    """Member of a record with the image; None takes the only one."""

    label_key: str | None = None
    """Member of a record with the class, or `json.<key>`; None is `cls`."""

    by_name: bool | None = None
    """True where records hold names of classes, not their labels."""

    channels: int | None = None
    """Channels of the images that training sees; None is 3."""

    depth: int | None = None
    """Bits of a channel; None is 8."""

    @property
    def left_out(self) -> str:
        """One line on all that is in no shard; empty where nothing was left out."""
        unreadable = exclusion("images that cannot be read", self.skipped)
        unreadable = [each.model_copy(update={"count": self.skipped_count}) for each in unreadable]
        return in_words([*unreadable, *(self.excluded or ())])

    @property
    def reader(self) -> RecordReader:
        """Reader of the image and the label of a record."""
        return RecordReader(RecordKeys(self.image_key, self.label_key), self.classes, bool(self.by_name))

    @property
    def digest(self) -> str:
        """Digest of the content: the shards by checksum and order, the classes, and how records are read."""
        shards = {
            name: [[shard.sha256, shard.count, *([shard.dropped] if shard.dropped else [])] for shard in split]
            for name, split in self.splits.items()
        }
        keys = {name: getattr(self, name) for name in ("image_key", "label_key", "by_name", "channels", "depth")}
        found = {name: value for name, value in keys.items() if value is not None}
        return digest({"shards": shards, "classes": self.classes, **found})

    @property
    def height_and_width(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        return height_and_width(self.image_size)

    @property
    def pixel_format(self) -> PixelFormat:
        """Channels and depth of the images."""
        return PixelFormat(self.channels or RGB.channels, self.depth or RGB.depth)

    @property
    def image_bytes(self) -> int:
        """Bytes of the pixels of an image."""
        return math.prod(self.height_and_width) * self.pixel_format.channels * self.pixel_format.depth // 8

    def count(self, split: str) -> int:
        """Images in a split."""
        return sum(shard.count for shard in self.splits[split])


def write_manifest(storage: Storage, prefix: str, manifest: Manifest) -> None:
    """Put the manifest beside its shards."""
    storage.write_json(_path(prefix), manifest.model_dump(mode="json", exclude_none=True))


def read_manifest(storage: Storage, prefix: str = "") -> Manifest:
    """The manifest of the shards in a folder; UserError where there is none, or a damaged one."""
    path = _path(prefix)
    try:
        return Manifest.model_validate_json(storage.read_bytes(path))
    except FileNotFoundError as error:
        raise UserError(f"no shards in {storage.url(prefix)}: it has no {MANIFEST}; prepare them first") from error
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UserError(
            f"{storage.url(path)} is no manifest ({reason}); delete its folder and prepare it again"
        ) from error


def _path(prefix: str) -> str:
    return f"{prefix}/{MANIFEST}" if prefix else MANIFEST


def shard_file(storage: Storage, split: str, shard: ShardInfo) -> Path:
    """Return a local file with the content of a shard, checked against the manifest; open it at once.

    A shard on this machine is hashed once in a process, at 0.6 s/GB of the page cache: 2 % of what decoding its images
    takes. One of a store is hashed by the process that fetches it, for all processes of the machine.

    Args:
        storage: the folder of the manifest.
        split: the split of the shard.
        shard: its entry in the manifest.

    Raises:
        UserError: the shard is not there, or its size or checksum is another.
    """
    name = f"{split}/{shard.name}"
    if shard.url is not None:
        storage, name = storage.at(shard.url), ""
    try:
        # What is fetched is checked by the storage, once; a local file here, once in a process.
        path = storage.local_file(name, None if storage.is_local else shard.sha256)
    except FileNotFoundError as error:
        raise UserError(
            f"{storage.url(name)} is gone, but the manifest names it: run the job that made it again"
        ) from error
    state = path.stat()
    if state.st_size != shard.bytes:
        raise UserError(
            f"{storage.url(name)}: {state.st_size} bytes where the manifest says {shard.bytes}: "
            "run the job that made it again"
        )
    if storage.is_local and _checksum(path, state.st_size, state.st_mtime_ns) != shard.sha256:
        raise UserError(
            f"{storage.url(name)}: its checksum is not the manifest's ({shard.sha256[:12]}...), so its content is "
            "damaged: delete it and run the job that made it again"
        )
    return path


def open_shard(storage: Storage, split: str, shard: ShardInfo, open_file: Callable[[Path], T]) -> T:
    """Open the local file of a shard with `open_file` and return its result.

    The file is fetched again where the cache drops it in the moment before it is open.

    Raises:
        UserError: as `shard_file` and `open_file` do, or the cache drops it every time.
    """
    for _ in range(_OPENINGS):
        try:
            return open_file(shard_file(storage, split, shard))
        except FileNotFoundError:
            continue
    raise UserError(
        f"storage.cache_bytes={storage.options.cache_bytes:,} is too small: {split}/{shard.name} was dropped from the "
        f"cache {_OPENINGS} times before it could be opened; raise it"
    )


def is_local(storage: Storage, shard: ShardInfo) -> bool:
    """Return whether a shard lies on this machine; `storage` is the folder of the manifest."""
    return (storage if shard.url is None else storage.at(shard.url)).is_local


@lru_cache(maxsize=4096)
def _checksum(path: Path, size: int, modified_ns: int) -> str:
    """SHA-256 of a file; size and time only key the cache."""
    return sha256_of(path)
