"""Files of sharded tensors, one of each rank, of which any rank reads and verifies no more than it needs.

A file is safetensors. Its header holds the offset and the SHA-256 of every tensor, so a reader that trusts the header
verifies each tensor that it reads. Whatever some ranks have saved is read by any number of ranks, sharded in any other
way.
"""

import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from vavae.distributed.sharded_tensors import TensorShard
from vavae.errors import UserError

_METADATA, _SHARDS, _OFFSETS, _DIGESTS = "__metadata__", "shards", "offsets", "sha256"
_LENGTH_BYTES = 8
"""Bytes of the length of a header, with which a file of safetensors begins."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

ReadRange = Callable[[int, int], bytes | memoryview]
"""Reads bytes from a start to before an end."""


class DamagedFileError(UserError):
    """A file, or a part of it, is not what was written."""


class _Entry(NamedTuple):
    """A shard in a file."""

    dtype: torch.dtype
    start: int
    """First byte in the file."""
    stop: int
    offset: int
    """Index of its first value in the flattened full tensor."""
    sha256: str | None
    """None in files that were written without; those are verified as a whole."""

    @property
    def length(self) -> int:
        """Number of values."""
        return (self.stop - self.start) // self.dtype.itemsize


class SavedShard(NamedTuple):
    """Values of a tensor as some rank has saved them."""

    name: str
    offset: int
    """Index of the first value in the flattened full tensor."""
    values: Tensor
    """[n]."""


def save_tensor_shards(parts: Mapping[str, TensorShard], file: Path) -> None:
    """Write one rank's shards: values under the names of the tensors, offsets and checksums as metadata."""
    offsets = {name: part.offset for name, part in parts.items()}
    digests = {name: _sha256(_bytes_of(part.values)) for name, part in parts.items()}
    # One entry, for safetensors writes several in any order, and equal shards must give equal files.
    metadata = {_SHARDS: json.dumps({_OFFSETS: offsets, _DIGESTS: digests})}
    save_file({name: part.values for name, part in parts.items()}, file, metadata)


def header_of(file: Path) -> bytes:
    """Read the header of a file, with its length in front."""
    with open(file, "rb") as opened:
        length = opened.read(_LENGTH_BYTES)
        return length + opened.read(int.from_bytes(length, "little"))


class ShardFile:
    """One rank's file of shards.

    Args:
        place: name of the file, for errors.
        header: as of `header_of`, verified by the caller.
        read: reads bytes of the file.
        read_whole: returns a function like `read` for whoever needs most of the file; None where there is no better.

    Raises:
        DamagedFileError: it is no header.
    """

    def __init__(
        self, place: str, header: bytes | memoryview, read: ReadRange, read_whole: Callable[[], ReadRange] | None = None
    ) -> None:
        self._place, self._read, self._read_whole = place, read, read_whole
        try:
            described = json.loads(bytes(header[_LENGTH_BYTES:]))
            metadata = described.pop(_METADATA)
            # Files that were written without checksums have the offsets alone.
            shards = (
                json.loads(metadata[_SHARDS]) if _SHARDS in metadata else {_OFFSETS: json.loads(metadata[_OFFSETS])}
            )
            offsets, digests = shards[_OFFSETS], shards.get(_DIGESTS, {})
            self._entries = {
                name: _Entry(
                    dtype=_DTYPES[entry["dtype"]],
                    start=len(header) + entry["data_offsets"][0],
                    stop=len(header) + entry["data_offsets"][1],
                    offset=offsets[name],
                    sha256=digests.get(name),
                )
                for name, entry in described.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFileError(f"{place}: no header of a file of tensors ({error})") from error

    @classmethod
    def open(cls, path: Path) -> "ShardFile":
        """Open a file on this machine; what is read stays readable when it is deleted.

        Raises:
            DamagedFileError: it is no such file.
        """
        read = map_file(path)
        length = int.from_bytes(read(0, _LENGTH_BYTES), "little")
        return cls(str(path), read(0, _LENGTH_BYTES + length), read)

    def overlapping(self, parts: Mapping[str, TensorShard], prefix: str = "") -> list[str]:
        """Names of the shards in the file that hold values of `parts`, which are all whose names begin so."""
        names = []
        for name, entry in self._entries.items():
            if not name.startswith(prefix):
                continue
            assert name in parts, f"{self._place}: {name} is of another module"
            first, values, shape = parts[name]
            assert entry.offset + entry.length <= shape.numel(), f"{self._place}: {name} is of another module"
            if max(entry.offset, first) < min(entry.offset + entry.length, first + len(values)):
                names.append(name)
        return names

    def fetch(self, names: Sequence[str]) -> list[SavedShard]:
        """Read and verify some shards, those that lie together in one piece.

        Raises:
            DamagedFileError: a checksum is another.
        """
        wanted = sorted(((self._entries[name], name) for name in names), key=lambda pair: pair[0].start)
        size = max((entry.stop for entry in self._entries.values()), default=0)
        read = self._read
        if self._read_whole is not None and 2 * sum(entry.stop - entry.start for entry, _ in wanted) >= size:
            read = self._read_whole()
        saved_shards = []
        while wanted:
            together = [wanted.pop(0)]
            while wanted and wanted[0][0].start == together[-1][0].stop:
                together.append(wanted.pop(0))
            start = together[0][0].start
            data = memoryview(read(start, together[-1][0].stop))
            for entry, name in together:
                saved_shards.append(self._saved_shard(name, entry, data[entry.start - start : entry.stop - start]))
        return saved_shards

    def _saved_shard(self, name: str, entry: _Entry, data: memoryview) -> SavedShard:
        if entry.sha256 is not None and _sha256(data) != entry.sha256:
            raise DamagedFileError(f"{self._place}: the SHA-256 of {name} is another")
        values = torch.frombuffer(data if not data.readonly else bytearray(data), dtype=entry.dtype)
        return SavedShard(name, entry.offset, values)


def map_file(path: Path) -> ReadRange:
    """Map a file into memory; returns a function that reads ranges of it without a copy."""
    with open(path, "rb") as file:
        # A private copy of what is written to, which nothing is: torch wants memory that could be.
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    return lambda start, stop: mapped[start:stop]


def fetch_tensor_shards(
    parts: Mapping[str, TensorShard], files: Iterable[ShardFile], prefix: str = ""
) -> list[SavedShard]:
    """Read and verify what a rank's shards are made of, strictly, from no more files than that takes.

    Args:
        parts: shards of this rank, which stay as they are.
        files: of all ranks that saved them, the one first that is most likely to hold them.
        prefix: of the names of the parts; what is named otherwise in the files is passed over.

    Raises:
        DamagedFileError: a checksum is another.
    """
    missing = {name: len(part.values) for name, part in parts.items()}
    saved_shards: list[SavedShard] = []
    for file in files:
        for saved in file.fetch(file.overlapping(parts, prefix)):
            low, high = _overlap(parts[saved.name], saved)
            missing[saved.name] -= high - low
            saved_shards.append(saved)
        if not any(missing.values()):
            break
    lacking = [name for name, values in missing.items() if values]
    assert not lacking, f"files of another module, without all of {lacking[0]}"
    return saved_shards


def fill_tensor_shards(parts: Mapping[str, TensorShard], saved_shards: Iterable[SavedShard]) -> None:
    """Fill a rank's shards with what `fetch_tensor_shards` read for them."""
    for saved in saved_shards:
        low, high = _overlap(parts[saved.name], saved)
        first, values, _ = parts[saved.name]
        values[low - first : high - first] = saved.values[low - saved.offset : high - saved.offset]


def load_tensor_shards(parts: Mapping[str, TensorShard], files: Iterable[Path]) -> None:
    """Fill a rank's shards from the files of all ranks, strictly."""
    fill_tensor_shards(parts, fetch_tensor_shards(parts, map(ShardFile.open, files)))


def _overlap(part: TensorShard, saved: SavedShard) -> tuple[int, int]:
    """Range of the flattened full tensor that both hold."""
    stops = saved.offset + len(saved.values), part.offset + len(part.values)
    return max(saved.offset, part.offset), min(stops)


def _bytes_of(values: Tensor) -> memoryview:
    return values.contiguous().view(torch.uint8).numpy().data if len(values) else memoryview(b"")


def _sha256(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
