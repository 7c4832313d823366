"""Files under one root, in a folder or an object store; the only place that knows fsspec.

Every write is whole or absent. On a local disk that is: temporary file in the same folder, fsync, rename, fsync of the
folder; an object store puts a whole object by itself. What the file system needs to know (endpoint, profile, key) comes
from fsspec's own configuration and the usual chain of credentials.
"""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from vavae.errors import UserError
from vavae.storage.config import DEFAULT_CACHE

_PARTIAL = ".partial"
_BLOCK_BYTES = 1 << 20


class Storage:
    """Files named by paths relative to ``root``, with "/" between the parts. Small to pickle.

    ``root`` is a folder or a URL; a relative folder becomes absolute, so that workers with another working directory
    mean the same one. ``cache`` is a local folder for :meth:`local_file`. A path that could leave the root raises
    UserError; a missing file raises FileNotFoundError; what the file system raises beyond that passes through.
    """

    def __init__(self, root: str, cache: str = DEFAULT_CACHE) -> None:
        try:
            # Other processes write too: a listing kept in this one would miss their files.
            self._fs, base = url_to_fs(root, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise UserError(
                f"storage {root!r}: {error}; give a folder or a URL whose fsspec package is here"
            ) from error
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.root = os.path.abspath(base) if self.is_local else root
        self.cache = cache
        self._base = (self.root if self.is_local else base).rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.root, self.cache)

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def url(self, path: str = "") -> str:
        """The full name of a path, for people and for other programs."""
        name = self._name(path)
        return name if self.is_local else self._fs.unstrip_protocol(name)

    def child(self, prefix: str) -> "Storage":
        """The storage whose root is a folder of this one."""
        return Storage(self.url(prefix), self.cache)

    def exists(self, path: str = "") -> bool:
        """Whether there is a file or a folder of this name."""
        return self._fs.exists(self._name(path))

    def is_file(self, path: str = "") -> bool:
        """Whether there is a file of this name; without one, whether the root is no folder but a file."""
        return self._fs.isfile(self._name(path))

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return self._fs.size(self._name(path))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every file beneath a folder, at any depth, by sorted path; empty where there is no such folder."""
        name = self._name(prefix)
        if self.is_local:
            return dict(sorted((self._relative(path), size) for path, size in _local_sizes(name)))
        return {self._relative(path): info["size"] for path, info in sorted(self._fs.find(name, detail=True).items())}

    def list(self, prefix: str = "", recursive: bool = False) -> list[str]:
        """Sorted paths of what lies directly in a folder (files and folders), or of all files beneath it."""
        if recursive:
            return [*self.sizes(prefix)]
        try:
            found = self._fs.ls(self._name(prefix), detail=False)
        except FileNotFoundError:
            return []
        return sorted(self._relative(path.rstrip("/")) for path in found if not path.endswith(_PARTIAL))

    def read_bytes(self, path: str) -> bytes:
        """The whole content of a file."""
        return self._fs.cat_file(self._name(path))

    def write_bytes(self, path: str, data: bytes) -> None:
        """Put a whole file, in place of one that is there."""
        if not self.is_local:
            self._fs.pipe_file(self._name(path), data)
            return
        with _replacing(Path(self._name(path))) as temporary:
            temporary.write_bytes(data)

    def read_json(self, path: str) -> Any:
        """The value in a JSON file; UserError where it holds something else."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise UserError(f"{self.url(path)} holds no JSON ({error}): delete it to have it made again") from error

    def write_json(self, path: str, value: Any) -> None:
        """Put a JSON file; equal values give equal bytes."""
        self.write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())

    @contextmanager
    def create(self, path: str) -> Iterator[Path]:
        """A local file to write into; put under ``path`` when the block ends, dropped when it raises."""
        if self.is_local:
            with _replacing(Path(self._name(path))) as temporary:
                yield temporary
        else:
            with tempfile.TemporaryDirectory(prefix="vavae-") as folder:
                temporary = Path(folder, "file")
                yield temporary
                self._fs.put_file(str(temporary), self._name(path))

    def put_file(self, local: str | os.PathLike[str], path: str) -> None:
        """Put a copy of a local file."""
        with self.create(path) as temporary:
            shutil.copyfile(local, temporary)

    def local_file(self, path: str = "") -> Path:
        """A local file with this content, to be read only: the file itself, or a copy in the cache.

        The copy is keyed by the full URL and by size and checksum as the store tells them, so another version or a file
        of the same name elsewhere is never taken for it.
        """
        name = self._name(path)
        if self.is_local:
            if not os.path.isfile(name):
                raise FileNotFoundError(name)
            return Path(name)
        size = self.size(path)
        key = hashlib.sha256(f"{self.url(path)} {size} {self._fs.checksum(name)}".encode()).hexdigest()
        copy = Path(self.cache).expanduser() / "files" / key / name.rpartition("/")[2]
        if not copy.exists():
            with _replacing(copy) as temporary:
                self._fs.get_file(name, str(temporary))
                if temporary.stat().st_size != size:
                    raise OSError(f"{self.url(path)}: got {temporary.stat().st_size} of {size} bytes")
        return copy

    def delete(self, path: str) -> None:
        """Delete a file, or a folder with all that is in it; nothing there is no error."""
        assert path, "the root of a storage is not ours to delete"
        name = self._name(path)
        if self._fs.exists(name):
            self._fs.rm(name, recursive=True)

    def _name(self, path: str) -> str:
        """The file system's own name of a relative path."""
        if not path:
            return self._base or "/"
        if any(part in ("", ".", "..") for part in path.split("/")):
            raise UserError(f"path {path!r} in {self.root}: give a relative path without empty parts, '.' or '..'")
        return f"{self._base}/{path}"

    def _relative(self, name: str) -> str:
        return name.removeprefix(f"{self._base}/")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a local file, in hexadecimal."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


def _local_sizes(folder: str) -> Iterator[tuple[str, int]]:
    """Files beneath a local folder, through links. What vanishes meanwhile is left out, a closed folder is an error."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise error

    for parent, _, names in os.walk(folder, onerror=refuse, followlinks=True):
        for name in names:
            path = f"{parent.rstrip('/')}/{name}"
            if not name.endswith(_PARTIAL) and os.path.isfile(path):
                yield path, os.path.getsize(path)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``target`` that takes its place, durably, when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{uuid.uuid4().hex}{_PARTIAL}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
