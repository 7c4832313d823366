"""WebDataset tars: written deterministically (USTAR, no times, no owners), and indexed fast whoever wrote them."""

import io
import mmap
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

KEY_DIGITS = 9

_BUFFER_BYTES = 4 << 20
_BLOCK = tarfile.BLOCKSIZE
_EMPTY, _END_MARK = bytes(_BLOCK), bytes(2 * _BLOCK)
# Offsets in the header of a member, as POSIX lays it out.
_NAME, _SIZE, _CHECKSUM, _TYPE = slice(0, 100), slice(124, 136), slice(148, 156), slice(156, 157)
_MAGIC, _PREFIX = slice(257, 263), slice(345, 500)
_FOLDER = b"5"
_PLAIN = (b"0", b"\0", _FOLDER)
_BINARY = b"\x80"  # begins a size that is not written in octal digits


class ShardWriter:
    """Writer of samples with members `<key>.<extension>` into an open tar."""

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
    with (
        path.open("wb", buffering=_BUFFER_BYTES) as file,  # small writes would leave small pages, slow to map
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        yield ShardWriter(tar)


def index_tar(path: Path, memory: mmap.mmap) -> dict[str, dict[str, tuple[int, int]]]:
    """Index the records of a tar: consecutive members of one key (WebDataset's rule).

    Args:
        path: the file, for what only `tarfile` understands: long names, PAX and GNU headers.
        memory: its content.

    Returns:
        By key, the path of the members up to the first dot of the name: their start and end by extension, in lower
        case.

    Raises:
        ValueError: the tar is damaged or ends early, a key comes twice, a name leads out of a folder, or a member is a
            link or a device.
    """
    records: dict[str, dict[str, tuple[int, int]]] = {}
    parts: dict[str, tuple[int, int]] = {}
    last, length = None, len(memory)
    for name, start, size in _members(path, memory):
        if start + size > length:
            raise ValueError(f"ends within {name}")
        if name.startswith("/") or (".." in name and ".." in name.split("/")):
            raise ValueError(f"member {name!r} leads out of the shard's folder")
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        key, extension = folder + slash + stem, extension.lower()
        if key != last:
            if key in records:
                raise ValueError(f"key {key!r} comes twice")
            last, parts = key, {}
            records[key] = parts
        if extension in parts:
            raise ValueError(f"member {name!r} comes twice")
        parts[extension] = (start, start + size)
    # A tar that ends between two members reads like a shorter one but for its end mark.
    if memory[-len(_END_MARK) :] != _END_MARK:
        raise ValueError(f"ends after {len(records)} records without the end mark")
    return records


def _members(path: Path, memory: mmap.mmap) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of every file in a tar, much faster than `tarfile` where plain headers suffice."""
    at, last = 0, len(memory) - _BLOCK
    offsets: list[int] = []
    headers: list[bytes] = []
    while at <= last:
        header = memory[at : at + _BLOCK]
        if header == _EMPTY:
            break
        kind = header[_TYPE]
        if kind not in _PLAIN or header[_SIZE] >= _BINARY:
            _check_headers(offsets, headers)
            yield from _members_by_tarfile(path, at)
            return
        try:
            size = int(header[_SIZE].strip(b" \0") or b"0", 8)
        except ValueError:
            size = -1
        if size < 0:
            raise ValueError(f"no header of a tar member at byte {at}")
        offsets.append(at)
        headers.append(header)
        if kind != _FOLDER:
            name = header[_NAME].partition(b"\0")[0]
            if header[_PREFIX.start] and header[_MAGIC] == b"ustar\0":
                name = header[_PREFIX].partition(b"\0")[0] + b"/" + name
            yield name.decode(errors="surrogateescape"), at + _BLOCK, size
        at += _BLOCK * (1 + -(-size // _BLOCK))
    _check_headers(offsets, headers)


def _check_headers(offsets: list[int], headers: list[bytes]) -> None:
    """Compare the checksums of headers, all at once; ValueError names the first that is none."""
    fields = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _BLOCK)
    sums = fields.sum(1, dtype=np.uint32) + 8 * ord(" ") - fields[:, _CHECKSUM].sum(1, dtype=np.uint32)
    digits = (sums[:, None] >> np.arange(15, -1, -3) & 7) + ord("0")  # six octal ones, as most programs write them
    others = (fields[:, _CHECKSUM.start : _CHECKSUM.start + 6] != digits).any(1)
    for index in np.flatnonzero(others).tolist():
        if headers[index][_CHECKSUM].strip(b" \0").lstrip(b"0") != b"%o" % sums[index]:
            raise ValueError(f"no header of a tar member at byte {offsets[index]}")


def _members_by_tarfile(path: Path, offset: int) -> Iterator[tuple[str, int, int]]:
    with path.open("rb") as file:
        file.seek(offset)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isreg():
                        yield member.name, member.offset_data, member.size
                    elif not member.isdir():
                        raise ValueError(f"member {member.name!r} is a link or a device")
        except tarfile.TarError as error:
            raise ValueError(str(error)) from error
