"""Files under one root, in a folder or an object store.

Every write is whole or absent. On a local disk that is: temporary file in the same folder, fsync, rename, fsync of the
folder; an object store puts a whole object by itself. A store is asked again while its errors are of the kind that
passes; keys come from the usual chain of credentials.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, Any, TypeVar

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import tokenize

from vavae.config import is_hub_address
from vavae.errors import UserError
from vavae.storage.cache import Cache
from vavae.storage.config import StorageConfig, StorageOptions
from vavae.storage.filesystem import explained, open_place
from vavae.storage.local import PARTIAL, linked, local_files, naming_failed_writes, replacing, sha256_of
from vavae.storage.retry import COUNTERS, Retry
from vavae.storage.scratch import scratch_folder, warn_of_network_file_system

__all__ = ["Storage", "sha256_of"]

_ACCESS = ".access"
_PART_BYTES = 16 << 20
_FETCHES = 2
_SMALL_READS, _SMALL_READS_AHEAD = 16, 512
"""Small files that are asked for at the same time, and those that are held until they are wanted."""

Result = TypeVar("Result")


class Storage:
    """Files named by paths relative to ``root``, with "/" between the parts. Small to pickle; may cross a fork.

    ``root`` is a folder or a URL; a relative folder becomes absolute, so that workers with another working directory
    mean the same one. It may be a place on the hub, ``hf-hub:owner/name``, to read from. ``cache`` is a local folder
    for :meth:`local_file`; None is one below each machine's temporary folder. ``options`` say how a store is reached.
    ``Storage.counters`` holds this process's totals over all storages. A path that could leave the root raises
    UserError, and so does a store that refuses access; a missing file raises FileNotFoundError; a store that goes on
    failing raises :class:`vavae.storage.retry.StorageUnavailableError`.
    """

    counters = COUNTERS

    def __init__(self, root: str, cache: str | None = None, options: StorageOptions | None = None) -> None:
        self.options = StorageOptions() if options is None else options
        self._place, self._process = open_place(root, self.options), os.getpid()
        self.is_local = isinstance(self._place.filesystem, LocalFileSystem)
        base = os.path.abspath(self._place.base) if self.is_local else self._place.base
        # Another machine fetches by itself what is on the hub.
        self.root = base if self.is_local and not is_hub_address(root) else root
        self.cache = cache
        self._base = base.rstrip("/")
        self._retry = Retry.of(self.options)

    @staticmethod
    def of(config: StorageConfig) -> "Storage":
        """The storage that a configuration describes."""
        options = StorageOptions(**{name: getattr(config, name) for name in StorageOptions.model_fields})
        return Storage(config.root, config.cache, options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.root, self.cache, self.options.model_dump(exclude_defaults=True))

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def url(self, path: str = "") -> str:
        """The full name of a path, for people and for other programs."""
        name = self._name(path)
        return name if self.is_local else self._fs.unstrip_protocol(name)

    @property
    def cache_folder(self) -> Path:
        """Folder of this machine for the cache."""
        return scratch_folder() if self.cache is None else Path(self.cache).expanduser()

    def warn_of_slow_cache(self) -> None:
        """Log a warning where what is fetched from this storage would be kept on a network file system."""
        if not self.is_local:
            warn_of_network_file_system(self.cache_folder)

    def child(self, prefix: str) -> "Storage":
        """The storage whose root is a folder of this one."""
        return self.at(self.url(prefix))

    def at(self, root: str) -> "Storage":
        """The storage at another folder or URL, reached with the same options."""
        return Storage(root, self.cache, self.options)

    def exists(self, path: str = "") -> bool:
        """Return whether there is a file or a folder of this name."""
        return self._kind(path) is not None

    def is_file(self, path: str = "") -> bool:
        """Return whether there is a file of this name; without a name, whether the root itself is a file."""
        return self._kind(path) == "file"

    def size(self, path: str) -> int:
        """Size of a file, bytes."""
        return self._info(path)["size"]

    def modified(self, path: str) -> datetime | None:
        """Time at which a file was put; None where its store doesn't tell."""
        name = self._name(path)
        try:
            return self._ask(path, lambda: self._fs.modified(name))
        except NotImplementedError:
            return None

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes of all files beneath a folder, at any depth, by sorted path; empty without such a folder."""
        name = self._name(prefix)
        if self.is_local:
            return dict(sorted((self._relative(path), size) for path, size in local_files(name).sizes.items()))
        found = self._ask(prefix, lambda: self._fs.find(name, detail=True))
        # An object whose name ends in a slash stands for a folder: other programs put them.
        return {self._relative(path): info["size"] for path, info in sorted(found.items()) if not path.endswith("/")}

    def list(self, prefix: str = "", recursive: bool = False) -> list[str]:
        """Sorted paths of what lies directly in a folder (files and folders), or of all files beneath it."""
        if recursive:
            return [*self.sizes(prefix)]
        name = self._name(prefix)
        try:
            found = self._ask(prefix, lambda: self._fs.ls(name, detail=False))
        except FileNotFoundError:
            return []
        paths = {path.rstrip("/") for path in found if not path.endswith(PARTIAL)} - {name.rstrip("/")}
        return sorted(map(self._relative, paths))

    def read_bytes(self, path: str) -> bytes:
        """The whole content of a file."""
        name = self._name(path)
        return self._read(path, lambda: self._fs.cat_file(name))

    def read_many(self, paths: Sequence[str]) -> Iterator[bytes | None]:
        """Yield the whole contents of small files in order, read some at a time; None for one that is not there."""

        def read(path: str) -> bytes | None:
            try:
                return self.read_bytes(path)
            except FileNotFoundError:
                return None

        with ThreadPool(_SMALL_READS) as pool:
            for first in range(0, len(paths), _SMALL_READS_AHEAD):
                yield from pool.map(read, paths[first : first + _SMALL_READS_AHEAD])

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to before ``stop`` of a file, ``0 <= start < stop``; fewer where the file ends before."""
        assert 0 <= start < stop, f"no bytes from {start} to {stop}"
        name = self._name(path)
        return self._read(path, lambda: self._fs.cat_file(name, start=start, end=stop))

    def write_bytes(self, path: str, data: bytes) -> None:
        """Put a whole file, in place of one that is there."""
        name = self._name(path)
        if self.is_local:
            with replacing(Path(name)) as temporary:
                temporary.write_bytes(data)
        else:
            self._write(path, len(data), lambda: self._fs.pipe_file(name, data))

    def read_json(self, path: str) -> Any:
        """The value in a JSON file; UserError where it holds something else."""
        data = self.read_bytes(path)
        try:
            return json.loads(data)
        except ValueError as error:
            raise UserError(f"{self.url(path)} holds no JSON ({error}): delete it to have it made again") from error

    def write_json(self, path: str, value: Any) -> None:
        """Put a JSON file; equal values give equal bytes."""
        self.write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())

    @contextmanager
    def create(self, path: str) -> Iterator[Path]:
        """Yield a local file to write into; it is put under ``path`` when the block ends, dropped when it raises."""
        name = self._name(path)
        if self.is_local:
            with replacing(Path(name)) as temporary:
                yield temporary
        else:
            with tempfile.TemporaryDirectory(prefix="vavae-") as folder:
                temporary = Path(folder, "file")
                with naming_failed_writes(temporary):
                    yield temporary
                self._write(path, temporary.stat().st_size, lambda: self._fs.put_file(str(temporary), name))

    def put_file(self, local: str | os.PathLike[str], path: str) -> None:
        """Put a copy of a local file."""
        with self.create(path) as temporary:
            shutil.copyfile(local, temporary)

    def check_writing(self) -> None:
        """Put an empty file and delete it again, with the folders that this made; raises as :meth:`write_bytes`."""
        made = [
            folder for folder in (Path(self._base), *Path(self._base).parents) if self.is_local and not folder.exists()
        ]
        self.write_bytes(_ACCESS, b"")
        self.delete(_ACCESS)
        with suppress(OSError):  # others may have put something there
            for folder in made:
                folder.rmdir()

    def copy_from(self, source: "Storage", path: str) -> None:
        """Put what another storage of the same kind has under the same path, without its bytes passing through here.

        On one local disk it becomes a second name of the same file, which is safe because files are replaced and never
        changed; elsewhere the store copies it.
        """
        origin, target = source._name(path), self._name(path)
        assert self.is_local == source.is_local, f"{source.url()} and {self.url()} are of two kinds"
        if self.is_local:
            linked(Path(origin), Path(target))
        else:
            self._ask(path, lambda: self._fs.cp_file(origin, target))

    def local_file(self, path: str = "", sha256: str | None = None) -> Path:
        """A local file with this content, to be read only: the file itself, or a copy in the cache.

        The copy is keyed by the full URL and by size and checksum as the store tells them, so another version or a file
        of the same name elsewhere is never taken for it. With ``sha256`` it is keyed by that: a copy that is here needs
        no request. Open it at once, for the cache may drop it; what is open or mapped stays readable.

        Raises:
            UserError: the file's SHA-256 is another than ``sha256``, when fetched a second time too.
        """
        name = self._name(path)
        if self.is_local:
            if not os.path.isfile(name):
                raise FileNotFoundError(name)
            if sha256 is not None and sha256_of(name) != sha256:
                raise self._damaged(path, sha256)
            return Path(name)
        info = self._info(path) if sha256 is None else {}
        version = sha256 or f"{info['size']} {_version(info)}"
        return Cache(self.cache_folder, self.options.cache_bytes).get(
            hashlib.sha256(f"{self.url(path)} {version}".encode()).hexdigest(),
            name.rpartition("/")[2],
            lambda: info["size"] if info else self.size(path),
            lambda file: self._fetch(path, file, _version(info) if sha256 is None else None, sha256),
        )

    def signed_link(self, path: str, content_type: str, seconds: int) -> str | None:
        """A link that opens a file in a browser, without keys, for a while; None where its store signs none.

        Args:
            path: of the file.
            content_type: what a browser is told that it is, such as text/html.
            seconds: time for which the link works.
        """
        if self.is_local:
            return None
        name = self._name(path)
        try:
            return self._ask(path, lambda: self._fs.sign(name, expiration=seconds, ResponseContentType=content_type))
        except (NotImplementedError, TypeError):  # it signs nothing, or can't say what type a file is of
            return None

    def delete(self, path: str) -> None:
        """Delete a file, or a folder with all that is in it; nothing there is no error."""
        assert path, "the root of a storage is not ours to delete"
        name = self._name(path)
        if self.exists(path):
            self._ask(path, lambda: self._fs.rm(name, recursive=True))

    @property
    def _fs(self) -> Any:
        """The file system, opened anew in a forked process: connections cannot be shared."""
        if self._process != os.getpid():
            self._place, self._process = open_place(self.root, self.options), os.getpid()
        return self._place.filesystem

    def _ask(self, path: str, operation: Callable[[], Result]) -> Result:
        """The result of a call of the file system, tried again while its errors are transient."""
        if self.is_local:
            return operation()
        url = self.url(path)
        try:
            return self._retry.call(url, operation)
        except Exception as error:
            better = explained(error, url, getattr(self._fs, "endpoint", None))
            if better is None:
                raise
            raise better from None

    def _read(self, path: str, operation: Callable[[], bytes]) -> bytes:
        data = self._ask(path, operation)
        if not self.is_local:
            COUNTERS.add(bytes_read=len(data))
        return data

    def _write(self, path: str, size: int, operation: Callable[[], Any]) -> None:
        try:
            self._ask(path, operation)
        except FileNotFoundError:
            raise UserError(f"{self.url(path)}: there is no such bucket: make it, or correct its name") from None
        COUNTERS.add(bytes_written=size)

    def _info(self, path: str) -> dict[str, Any]:
        """Metadata of a file or folder as its file system has them: at least size and type."""
        name = self._name(path)
        return self._ask(path, lambda: self._fs.info(name))

    def _kind(self, path: str) -> str | None:
        """Type of a path: "file", "directory", or None where there is nothing."""
        name = self._name(path)
        if self.is_local:
            return "file" if os.path.isfile(name) else "directory" if os.path.isdir(name) else None
        try:
            return self._info(path)["type"]
        except FileNotFoundError:
            return None

    def _fetch(self, path: str, file: IO[bytes], version: str | None, sha256: str | None) -> None:
        """Write a file's content into a local one of its size, and check it."""
        for _ in range(_FETCHES):
            self._download(path, file)
            COUNTERS.add(fetched_files=1)
            if sha256 is None or sha256_of(file.name) == sha256:
                break
        else:
            raise self._damaged(path, sha256)
        if version is not None and _version(self._info(path)) != version:
            raise OSError(f"{self.url(path)} was changed while it was fetched")

    def _download(self, path: str, file: IO[bytes]) -> None:
        """Fill a local file from a store, some parts of it at a time."""
        size = os.fstat(file.fileno()).st_size

        def fetch_part(start: int) -> None:
            stop = min(start + _PART_BYTES, size)
            data = self.read_range(path, start, stop)
            if len(data) != stop - start:
                raise OSError(f"{self.url(path)}: got {len(data)} of {stop - start} bytes at {start}")
            if os.pwrite(file.fileno(), data, start) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)

        pool = ThreadPool(self.options.connections)  # of daemons: a fetch in the background keeps no process alive
        try:
            for _ in pool.imap(fetch_part, range(0, size, _PART_BYTES)):
                pass
        finally:
            pool.terminate()
            pool.join()

    def _damaged(self, path: str, sha256: str | None) -> UserError:
        return UserError(f"{self.url(path)}: its SHA-256 is not {sha256}: the file is damaged; restore or remake it")

    def _name(self, path: str) -> str:
        """The file system's own name of a relative path."""
        if not path:
            return self._base or "/"
        if any(part in ("", ".", "..") for part in path.split("/")):
            raise UserError(f"path {path!r} in {self.root}: give a relative path without empty parts, '.' or '..'")
        return f"{self._base}/{path}"

    def _relative(self, name: str) -> str:
        return name.removeprefix(f"{self._base}/")


def _restore(root: str, cache: str | None, options: dict[str, Any]) -> Storage:
    return Storage(root, cache, StorageOptions(**options))


def _version(info: dict[str, Any]) -> str:
    """Tag that tells this version of a file from another one."""
    return info.get("ETag") or tokenize(info)
