"""Whole shards mapped into memory: any record of a WebDataset tar without reading what lies before it."""

import mmap
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from vavae.errors import UserError

T = TypeVar("T")

_END_BYTES = 2 * tarfile.BLOCKSIZE


class ShardCache(Generic[T]):
    """The most recently used open shards. Maps stay in the process that made them: a pickled cache arrives empty."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: OrderedDict[int, T] = OrderedDict()

    def __reduce__(self) -> tuple[type["ShardCache[T]"], tuple[int]]:
        return type(self), (self._limit,)

    def get(self, shard: int, open_shard: Callable[[int], T]) -> T:
        """The open shard of an index, opened if it is not."""
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

    Raises:
        UserError: the file is no tar, ends early or has another count.
    """

    def __init__(self, path: Path, count: int | None = None) -> None:
        try:
            with path.open("rb") as file:
                self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    groups = _group(tar)
        except (tarfile.TarError, ValueError) as error:
            raise UserError(f"{path}: not a readable shard ({error}); make the shards again") from error
        # A tar that ends between two members reads like a shorter one but for its end mark.
        if self._memory[-_END_BYTES:] != bytes(_END_BYTES):
            raise UserError(f"{path}: ends after {len(groups)} records without the end mark; make the shards again")
        if count not in (None, len(groups)):
            raise UserError(f"{path}: {len(groups)} records where the manifest says {count}; make the shards again")
        self._records = list(groups.values())

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, record: int) -> Mapping[str, bytes]:
        parts = self._records[record]
        return {extension: self._memory[start:end] for extension, (start, end) in parts.items()}


def _group(tar: tarfile.TarFile) -> dict[str, dict[str, tuple[int, int]]]:
    """Byte ranges of each record's members, grouped by the name before the first dot (WebDataset's rule)."""
    records: dict[str, dict[str, tuple[int, int]]] = {}
    for member in tar:
        if member.isfile():
            key, _, extension = member.name.rpartition("/")[2].partition(".")
            records.setdefault(key, {})[extension] = (member.offset_data, member.offset_data + member.size)
    return records
