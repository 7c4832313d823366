"""WebDataset tars: ours depend on nothing but their content (USTAR, no times, no owners), and any is indexed fast."""

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

KEY_DIGITS = 9

_BLOCK = tarfile.BLOCKSIZE
_EMPTY, _END_MARK = bytes(_BLOCK), bytes(2 * _BLOCK)
# Offsets in the header of a member, as POSIX lays it out.
_NAME, _SIZE, _CHECKSUM, _TYPE = slice(0, 100), slice(124, 136), slice(148, 156), slice(156, 157)
_MAGIC, _PREFIX = slice(257, 263), slice(345, 500)
_FILE, _FOLDER = (b"0", b"\0"), b"5"


class ShardWriter:
    """Writes samples of members `<key>.<extension>` into an open tar."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.count = 0

    def add(self, index: int, members: dict[str, bytes]) -> None:
        """Append a sample: its index becomes the key, `members` maps extensions to contents."""
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{index:0{KEY_DIGITS}d}.{extension}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self.count += 1


@contextmanager
def write_tar(path: Path) -> Iterator[ShardWriter]:
    """Write a shard into a local file; equal samples give equal bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        yield ShardWriter(tar)


class TarRecord(NamedTuple):
    """One record of a WebDataset tar."""

    key: str
    """Path of its members up to the first dot of the name."""
    parts: dict[str, tuple[int, int]]
    """Byte range by extension, in lower case."""


def index_tar(path: Path, memory: memoryview) -> list[TarRecord]:
    """The records of a tar: consecutive members of one key (WebDataset's rule).

    Args:
        path: of the file, for what only `tarfile` understands: long names, PAX and GNU headers.
        memory: its content.

    Raises:
        ValueError: the tar is damaged or ends early, a key comes twice, or a name leads out of a folder.
    """
    records: list[TarRecord] = []
    seen: set[str] = set()
    for name, start, size in _members(path, memory):
        if start + size > len(memory):
            raise ValueError(f"ends within {name}")
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"member {name!r} leads out of the shard's folder")
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        key, extension = f"{folder}{slash}{stem}", extension.lower()
        if not records or records[-1].key != key:
            if key in seen:
                raise ValueError(f"key {key!r} comes twice")
            seen.add(key)
            records.append(TarRecord(key, {}))
        if extension in records[-1].parts:
            raise ValueError(f"member {name!r} comes twice")
        records[-1].parts[extension] = (start, start + size)
    # A tar that ends between two members reads like a shorter one but for its end mark.
    if memory[-len(_END_MARK) :] != _END_MARK:
        raise ValueError(f"ends after {len(records)} records without the end mark")
    return records


def _members(path: Path, memory: memoryview) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every file in a tar, much faster than `tarfile` where plain headers suffice."""
    at = 0
    headers: list[int] = []
    while at + _BLOCK <= len(memory):
        header = memory[at : at + _BLOCK].tobytes()
        if header == _EMPTY:
            break
        if header[_TYPE] not in (*_FILE, _FOLDER) or header[_SIZE][0] & 0x80:
            _check_headers(memory, headers)
            yield from _members_by_tarfile(path, at)
            return
        try:
            size = int(header[_SIZE].strip(b" \0") or b"0", 8)
        except ValueError as error:
            raise ValueError(f"no header of a tar member at byte {at}") from error
        headers.append(at)
        if header[_TYPE] in _FILE:
            name = header[_NAME].partition(b"\0")[0]
            if header[_PREFIX.start] and header[_MAGIC] == b"ustar\0":
                name = header[_PREFIX].partition(b"\0")[0] + b"/" + name
            yield name.decode(errors="surrogateescape"), at + _BLOCK, size
        at += _BLOCK * (1 + -(-size // _BLOCK))
    _check_headers(memory, headers)


def _check_headers(memory: memoryview, offsets: list[int]) -> None:
    """Compare the checksums of headers, all at once; ValueError names the first that is none."""
    starts = np.array(offsets, np.int64)
    headers = np.frombuffer(memory, np.uint8)[starts[:, None] + np.arange(_BLOCK)]  # [N, 512]
    sums = headers.sum(1, dtype=np.int64) - headers[:, _CHECKSUM].sum(1, dtype=np.int64) + 8 * ord(" ")
    for at, field, found in zip(offsets, headers[:, _CHECKSUM], sums.tolist(), strict=True):
        if field.tobytes().strip(b" \0").lstrip(b"0") != b"%o" % found:
            raise ValueError(f"no header of a tar member at byte {at}")


def _members_by_tarfile(path: Path, offset: int) -> Iterator[tuple[str, int, int]]:
    with path.open("rb") as file:
        file.seek(offset)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                yield from ((member.name, member.offset_data, member.size) for member in tar if member.isreg())
        except tarfile.TarError as error:
            raise ValueError(str(error)) from error
