"""Local files: durable replacement, sizes, checksums."""

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def local_sizes(folder: str) -> Iterator[tuple[str, int]]:
    """Yield path and bytes of the files beneath a local folder, through links.

    What vanishes meanwhile is left out; a folder that cannot be read is an error.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise error

    for parent, _, names in os.walk(folder, onerror=refuse, followlinks=True):
        for name in names:
            path = f"{parent.rstrip('/')}/{name}"
            if not name.endswith(PARTIAL) and os.path.isfile(path):
                yield path, os.path.getsize(path)


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
