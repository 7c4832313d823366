"""Whole shards mapped into memory: any record of a WebDataset tar without reading what lies before it."""

import mmap
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from vavae.data.shards.tar import index_tar
from vavae.errors import UserError

T = TypeVar("T")

_GZIP = b"\x1f\x8b"


class ShardCache(Generic[T]):
    """The most recently used open shards. Maps stay in the process that made them: a pickled cache arrives empty."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: OrderedDict[int, T] = OrderedDict()

    def __reduce__(self) -> tuple[type["ShardCache[T]"], tuple[int]]:
        return type(self), (self._limit,)

    def get(self, shard: int, open_shard: Callable[[int], T]) -> T:
        """Return the open shard of an index, opened if it is not."""
        if shard not in self._open:
            self._open[shard] = open_shard(shard)
        self._open.move_to_end(shard)
        while len(self._open) > self._limit:
            self._open.popitem(last=False)
        return self._open[shard]


class MappedShard:
    """A WebDataset tar in memory. `shard[i]` is the i-th record: extension → bytes.

    Args:
        path: the shard.
        count: records that the manifest promises, where there is one.
        dropped: positions of records that it leaves out.

    Raises:
        UserError: the file is no tar, ends early, has another count, a key twice or a name that leads elsewhere.
    """

    def __init__(self, path: Path, count: int | None = None, dropped: Collection[int] | None = None) -> None:
        try:
            with path.open("rb") as file:
                self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            records = index_tar(path, self._memory)
        except ValueError as error:
            with path.open("rb") as file:
                is_packed = file.read(len(_GZIP)) == _GZIP
            reason, remedy = ("it is gzipped", "unpack it") if is_packed else (error, "make the shards again")
            raise UserError(f"{path}: not a readable shard ({reason}); {remedy}") from error
        if dropped:
            records = {key: parts for at, (key, parts) in enumerate(records.items()) if at not in dropped}
        if count not in (None, len(records)):
            raise UserError(f"{path}: {len(records)} records where the manifest says {count}; make the shards again")
        self._keys, self._records = list(records), list(records.values())

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, record: int) -> Mapping[str, bytes]:
        return {extension: self._memory[start:end] for extension, (start, end) in self._records[record].items()}

    def key(self, record: int) -> str:
        """Name of the i-th record."""
        return self._keys[record]
