"""Class folders in a folder, a zip or a tar."""

import gzip
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vavae.data.sources.listing import File, Listing, Record, list_class_folders
from vavae.errors import UserError
from vavae.storage.storage import Storage

_GZIP_MAGIC = b"\x1f\x8b"


class FolderSource:
    """A folder of class folders, local or in an object store."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def listing(self) -> Listing:
        """See :class:`~vavae.data.sources.listing.Source`; folders within a class folder belong to the class."""
        files = (File(path, 0, size) for path, size in self._storage.sizes().items())
        return list_class_folders("folder", self._storage.root, files)

    def read(self, record: Record) -> bytes:
        """The file."""
        return self._storage.read_bytes(record.key)


class ZipSource:
    """Class folders in a zip; `inside` names a folder of it to stay within."""

    def __init__(self, path: Path, inside: str) -> None:
        self._path, self._inside = path, inside
        try:
            self._zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UserError(f"source {path}: {error}; fetch it again") from error

    def listing(self) -> Listing:
        """See :class:`~vavae.data.sources.listing.Source`."""
        members = [member for member in self._zip.infolist() if not member.is_dir()]
        if any(member.flag_bits & 1 for member in members):
            raise UserError(f"source {self._path}: encrypted; unpack it and name the folder")
        files = (File(member.filename, 0, member.file_size) for member in members)
        return list_class_folders("zip", str(self._path), files, self._inside)

    def read(self, record: Record) -> bytes:
        """The member, verified by its checksum."""
        try:
            return self._zip.read(record.key)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise UserError(
                f"source {self._path}: {record.key} is damaged ({error}); fetch the archive again"
            ) from error


class TarSource:
    """Class folders in a tar, plain or gzipped; a gzipped one is unpacked into a nameless temporary file first."""

    def __init__(self, path: Path, inside: str) -> None:
        self._path, self._inside = path, inside
        try:
            self._file = _plain_tar(path)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"source {path}: damaged gzip ({error}); fetch it again") from error

    def listing(self) -> Listing:
        """See :class:`~vavae.data.sources.listing.Source`."""
        try:
            return list_class_folders("tar", str(self._path), self._members(), self._inside)
        except tarfile.TarError as error:
            raise UserError(f"source {self._path}: no zip or tar archive, or a damaged one ({error})") from error

    def read(self, record: Record) -> bytes:
        """The member, without reading what lies before it."""
        data = os.pread(self._file.fileno(), record.size, record.position)
        if len(data) != record.size:
            raise UserError(f"source {self._path}: ends within {record.key}; fetch the archive again")
        return data

    def _members(self) -> Iterator[File]:
        self._file.seek(0)
        with tarfile.open(fileobj=self._file, mode="r:") as tar:
            for member in tar:
                if member.isreg():
                    yield File(member.name.removeprefix("./"), member.offset_data, member.size)
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header


def _plain_tar(path: Path) -> IO[bytes]:
    file = path.open("rb")
    packed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    if not packed:
        return file
    file.close()
    plain = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the source
    with gzip.open(path) as unpacked:
        shutil.copyfileobj(unpacked, plain)
    plain.flush()
    return plain
