"""The cache of whole files on this machine: fetched once for all processes, bounded in size, safe under kill -9.

A file appears under its name when it is whole. Until then it is a ``.partial`` file that its writer holds locked: one
without a lock was left by a process that died, and is swept. What is dropped is unlinked and never truncated, so that
whoever has it open or mapped keeps its pages; the space comes back when the last one closes it.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from vavae.errors import UserError
from vavae.storage.local import PARTIAL, naming_failed_writes


class Cache:
    """A folder of at most ``limit`` bytes; what was asked for longest ago is dropped first.

    The file that is being fetched counts in full from the start. What is fetched at the same moment by other processes
    is never dropped, so the bound holds as long as those files fit in it together.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._root = folder
        self._files = self._root / "files"
        self._limit = limit

    def get(self, key: str, name: str, size: Callable[[], int], fetch: Callable[[IO[bytes]], None]) -> Path:
        """Return the file of this key, called ``name``. Open it at once: later it may have been dropped.

        ``size`` gives its bytes and ``fetch`` writes them, both only where it is not here yet. Of several processes and
        threads that ask for the same file one fetches it and the others wait.
        """
        target = self._files / key / name
        while not _touch(target):
            with _locked(target.with_name(PARTIAL)) as partial:
                if partial is None:
                    continue  # the process that held the lock has finished, or given up
                try:
                    if not target.exists():
                        with naming_failed_writes(target):
                            self._reserve(partial, size())
                            fetch(partial)
                            partial.flush()
                            os.fsync(partial.fileno())
                        os.replace(partial.name, target)
                finally:
                    Path(partial.name).unlink(missing_ok=True)
        return target

    def _reserve(self, partial: IO[bytes], size: int) -> None:
        """Evict files to make room for ``size`` bytes, and extend the partial file so that others see it taken."""
        if size > self._limit:
            raise UserError(f"storage.cache_bytes = {self._limit:,} cannot hold a file of {size:,} bytes: raise it")
        with open(self._root / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            partial.truncate(0)  # what a killed process wrote; nobody maps a partial file
            self._evict(self._limit - size)
            partial.truncate(size)

    def _evict(self, limit: int) -> None:
        """Unlink files until the others take at most ``limit`` bytes."""
        used, files = 0, []
        for entry in _entries(self._files):
            with suppress(FileNotFoundError):
                if entry.name.endswith(PARTIAL) and _is_abandoned(entry):
                    _drop(entry)
                    continue
                state = entry.stat()
                used += state.st_size
                if not entry.name.endswith(PARTIAL):
                    files.append((state.st_mtime_ns, entry, state.st_size))
        for _, file, size in sorted(files):
            if used <= limit:
                return
            _drop(file)
            used -= size


def _entries(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _touch(path: Path) -> bool:
    """Mark a file as used now; return whether it is there."""
    now = time.time_ns()  # the kernel's own clock is too coarse to tell what came first
    try:
        os.utime(path, ns=(now, now))
    except FileNotFoundError:
        return False
    return True


def _drop(path: Path) -> None:
    path.unlink(missing_ok=True)
    with suppress(OSError):  # another process is putting something into it
        path.parent.rmdir()


def _is_abandoned(partial: Path) -> bool:
    with open(partial, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes] | None]:
    """Yield the file under ``path``, created if absent, locked; None where it was renamed or dropped meanwhile.

    The lock belongs to the open file: it ends with the process, however that ends.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "r+b", opener=_open_or_make)  # noqa: SIM115  not truncated before it is locked
    except (FileNotFoundError, FileExistsError):
        yield None  # its folder was dropped, for mkdir between finding and looking at it
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file if _is_under(file, path) else None


def _open_or_make(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _is_under(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
