"""Local files: durable replacement, sizes, checksums."""

import errno
import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PARTIAL = ".partial"
_BLOCK_BYTES = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FAILED_WRITE = re.compile(r"\(os error (\d+)\)|inline_container\.cc")
"""Texts of failed writes in errors that are no OSError: those of safetensors, and those of torch, without a number."""


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a local file, in hexadecimal."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


class LocalFiles(NamedTuple):
    """The files beneath a local folder, through links; each folder once."""

    sizes: dict[str, int]
    """Bytes by path."""
    links: dict[str, str]
    """Real paths of those that are links, or lie in a folder that is one, by path."""
    unfollowed: list[str]
    """Paths of links that lead nowhere, or to a folder that is among these already."""
    empty: list[str]
    """Paths of folders without anything in them."""


def local_files(folder: str) -> LocalFiles:
    """List the files beneath a local folder, through links.

    A folder that several paths lead to is taken once: by its own path where that is beneath `folder`, else by the first
    link in sorted order; so a link to a folder above itself is no endless way. What vanishes meanwhile is left out; a
    folder that cannot be read is an error.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise error

    found = LocalFiles({}, {}, [], [])
    real_root = os.path.realpath(folder)
    visited: set[str] = set()
    waiting = [(folder.rstrip("/") or "/", real_root)]
    linked_folders: list[tuple[str, str]] = []
    while waiting:
        start, real_start = waiting.pop(0)
        for real, folders, names in os.walk(real_start, onerror=refuse):
            if real in visited:
                folders.clear()
                if real == real_start:
                    found.unfollowed.append(start)
                continue
            visited.add(real)
            parent = (start + real[len(real_start) :]).rstrip("/")
            if not folders and not names:
                found.empty.append(parent)
            for name in [name for name in folders if os.path.islink(f"{real}/{name}")]:
                folders.remove(name)
                linked_folders.append((f"{parent}/{name}", os.path.realpath(f"{real}/{name}")))
            for name in names:
                path, real_path = f"{parent}/{name}", f"{real.rstrip('/')}/{name}"
                if name.endswith(PARTIAL):
                    continue
                is_link = os.path.islink(real_path)
                try:
                    state = os.stat(real_path)
                except OSError:
                    if is_link:
                        found.unfollowed.append(path)
                    continue
                if stat.S_ISREG(state.st_mode):
                    found.sizes[path] = state.st_size
                    if is_link or real_start != real_root:
                        found.links[path] = os.path.realpath(real_path) if is_link else real_path
        if not waiting:
            waiting, linked_folders = sorted(linked_folders), []
    return found


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``target`` that takes its place, durably, when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
    try:
        with naming_failed_writes(target):
            yield temporary
            _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming_failed_writes(path: Path) -> Iterator[None]:
    """Let the error of a disk that is full name this file, which a failed write of an open one does not.

    Libraries that write a file by themselves raise errors of their own, which become an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _FULL:
            error.filename = str(path)
        raise
    except Exception as error:
        found = _FAILED_WRITE.search(str(error))
        if found is None:
            raise
        number = int(found[1] or errno.ENOSPC)
        raise OSError(number, os.strerror(number), str(path)) from error


def linked(source: Path, target: Path) -> None:
    """Give a file a second name, in place of what had it; a copy where one disk can't hold both names."""
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
            shutil.copyfile(source, temporary)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
