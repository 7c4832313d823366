"""Sources that are class folders in a folder, a zip or a tar."""

import gzip
import os
import posixpath
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO

from vavae.data.exclusions import Exclusion, exclusions
from vavae.data.image import IMAGE_SUFFIXES
from vavae.data.record import readable
from vavae.data.sources.listing import Arrange, File, Files, Listing, Record, list_class_folders
from vavae.errors import UserError
from vavae.storage.local import LocalFiles, local_files
from vavae.storage.storage import Storage

_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 16
# The header beside a zip's member: signature, flags, method, CRC-32, lengths of name and extra field.
_ZIP_HEADER = struct.Struct("<4s2xHH4xL8xHH")
_ZIP_MEMBER, _ZIP_DESCRIPTOR = b"PK\3\4", b"PK\7\x08"
_ENCRYPTED, _CHECKSUM_FOLLOWS = 1, 8
_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
_OTHER_METHODS = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "LZMA", 9: "Deflate64", 93: "Zstandard", 95: "xz"}
"""Names of methods by which the members of a zip may be packed, the second ones not read here."""
_OTHER_PACKINGS = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "Zstandard", b"7z\xbc\xaf": "7-Zip"}
"""Names of what packs whole archives, by their first bytes; none is read here."""


class FolderSource:
    """A folder of class folders, local or in an object store."""

    def __init__(self, storage: Storage, arrange: Arrange = list_class_folders) -> None:
        self._storage, self._arrange = storage, arrange

    def listing(self) -> Listing:
        """List all images of the folder; folders within a class folder belong to the class."""
        files, excluded = self._files()
        source = Files("folder", self._storage.root, files, self._read_file, excluded=excluded)
        return self._arrange(source)

    def read(self, record: Record) -> bytes:
        """Read one image file."""
        return self._storage.read_bytes(record.key)

    def _read_file(self, file: File) -> bytes:
        return self._storage.read_bytes(file.path)

    def _files(self) -> tuple[Iterable[File], list[Exclusion]]:
        """All files, each once, and empty folders; and links that are left out for what they lead to."""
        if not self._storage.is_local:
            return (File(path, 0, size) for path, size in self._storage.sizes().items()), []
        root = f"{self._storage.root.rstrip('/')}/"
        found = local_files(self._storage.root)
        twins = _twins(found, root)
        names = {
            "links to images that are there already": twins,
            "links to folders that are there already, or to nothing": sorted(found.unfollowed),
        }
        excluded = exclusions(
            {reason: [readable(path.removeprefix(root)) for path in names[reason]] for reason in names}
        )
        left_out = {*twins}
        sizes = ((path.removeprefix(root), size) for path, size in found.sizes.items() if path not in left_out)
        empty = (File(f"{path.removeprefix(root)}/", 0, 0) for path in found.empty if path != self._storage.root)
        return chain((File(path, 0, size) for path, size in sorted(sizes)), empty), excluded


def _twins(found: LocalFiles, root: str) -> list[str]:
    """Paths of links to images that have another path among the files, sorted."""
    images = [path for path in found.sizes if Path(path).suffix.lower() in IMAGE_SUFFIXES]
    if not found.links:
        return []
    real_root = f"{os.path.realpath(root).rstrip('/')}/"
    taken = {real_root + path.removeprefix(root) for path in images if path not in found.links}
    twins = []
    for path in sorted(path for path in images if path in found.links):
        if found.links[path] in taken:
            twins.append(path)
        taken.add(found.links[path])
    return twins


class ZipSource:
    """Class folders in a zip; `inside` names a folder of it to stay within.

    Reading goes by the headers beside the members: the directory takes half a kilobyte a member, in every process that
    reads it.
    """

    def __init__(self, path: Path, inside: str, arrange: Arrange = list_class_folders) -> None:
        self._path, self._inside, self._arrange = path, inside, arrange
        self._file = path.open("rb")

    def listing(self) -> Listing:
        """List all images of the archive, as :class:`~vavae.data.sources.listing.Source` does."""
        try:
            with zipfile.ZipFile(self._path) as archive:
                members = archive.infolist()
        except zipfile.BadZipFile as error:
            raise UserError(f"source {self._path}: {error}; fetch it again") from error
        if any(member.flag_bits & _ENCRYPTED for member in members):
            raise UserError(f"source {self._path}: encrypted; unpack it and name the folder")
        link = next((member.filename for member in members if stat.S_ISLNK(member.external_attr >> 16)), None)
        if link:
            raise _not_a_file(self._path, link)
        packed = next((member for member in members if member.compress_type not in _METHODS), None)
        if packed:
            raise _other_method(self._path, packed.filename, packed.compress_type)
        # Old programs of Windows separate folders by their own character.
        foreign = any("\\" in member.filename for member in members) and not any("/" in m.filename for m in members)
        files = (
            File(
                member.filename.replace("\\", "/") if foreign else member.filename,
                member.header_offset,
                member.file_size,
            )
            for member in members
        )
        return self._arrange(Files("zip", str(self._path), files, self._read_file, self._inside))

    def read(self, record: Record) -> bytes:
        """Read one member, verified by its checksum."""
        try:
            return self._member(record)
        except (zipfile.BadZipFile, zlib.error, struct.error) as error:
            raise UserError(
                f"source {self._path}: {record.key} is damaged ({error}); fetch the archive again"
            ) from error

    def _read_file(self, file: File) -> bytes:
        return self.read(Record(file.path, 0, file.position, file.size))

    def _member(self, record: Record) -> bytes:
        self._file.seek(record.position)
        signature, flags, method, crc, name, extra = _ZIP_HEADER.unpack(self._file.read(_ZIP_HEADER.size))
        if signature != _ZIP_MEMBER:
            raise zipfile.BadZipFile("no header where it should begin")
        self._file.seek(name + extra, os.SEEK_CUR)
        if method == zipfile.ZIP_STORED:
            data = self._file.read(record.size)
        elif method == zipfile.ZIP_DEFLATED:
            data = self._inflate()
        else:
            raise _other_method(self._path, record.key, method)
        if flags & _CHECKSUM_FOLLOWS:
            first, second = struct.unpack("<4sL", self._file.read(8))
            crc = second if first == _ZIP_DESCRIPTOR else int.from_bytes(first, "little")
        if len(data) != record.size or zlib.crc32(data) != crc:
            raise zipfile.BadZipFile("its checksum is another")
        return data

    def _inflate(self) -> bytes:
        """Inflate the member at the file's position, and leave the file at the member's end."""
        decompressor, data = zlib.decompressobj(-zlib.MAX_WBITS), bytearray()
        while not decompressor.eof:
            packed = self._file.read(_CHUNK_BYTES)
            if not packed:
                raise zipfile.BadZipFile("it ends early")
            data += decompressor.decompress(packed)
        self._file.seek(-len(decompressor.unused_data), os.SEEK_CUR)
        return bytes(data)


class TarSource:
    """Class folders in a tar, plain or gzipped; a gzipped one is unpacked into a nameless temporary file first.

    A tar within the tar counts as a folder of its name, as ImageNet's training set comes.
    """

    def __init__(self, path: Path, inside: str, arrange: Arrange = list_class_folders) -> None:
        self._path, self._inside, self._arrange = path, inside, arrange
        try:
            self._file = _plain_tar(path)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"source {path}: damaged gzip ({error}); fetch it again") from error

    def listing(self) -> Listing:
        """List all images of the archive, as :class:`~vavae.data.sources.listing.Source` does."""
        try:
            return self._arrange(Files("tar", str(self._path), self._members(), self._read_file, self._inside))
        except tarfile.TarError as error:
            raise UserError(f"source {self._path}: no zip or tar archive, or a damaged one ({error})") from error

    def read(self, record: Record) -> bytes:
        """Read one member, without reading what lies before it."""
        data = os.pread(self._file.fileno(), record.size, record.position)
        if len(data) != record.size:
            raise UserError(f"source {self._path}: ends within {record.key}; fetch the archive again")
        return data

    def _read_file(self, file: File) -> bytes:
        return self.read(Record(file.path, 0, file.position, file.size))

    def _members(self) -> Iterator[File]:
        for member in _regular_files(self._path, self._file, 0):
            folder, suffix = posixpath.splitext(member.path)
            if suffix != ".tar":
                yield member
            else:
                inner = _regular_files(self._path, self._file, member.position)
                yield from (file._replace(path=f"{folder}/{file.path}") for file in inner)


def check_packing(path: Path) -> None:
    """Refuse an archive that is packed by a method that is not read here, by its first bytes alone.

    Raises:
        UserError: it is; the method is named.
    """
    with path.open("rb") as file:
        start = file.read(max(map(len, _OTHER_PACKINGS)))
        name = next((name for magic, name in _OTHER_PACKINGS.items() if start.startswith(magic)), None)
        if name:
            raise UserError(f"source {path}: packed by {name}, which is not read here; unpack it and name the folder")
        file.seek(0)
        header = file.read(_ZIP_HEADER.size)
        while len(header) == _ZIP_HEADER.size and header.startswith(_ZIP_MEMBER):
            _, _, method, _, name_bytes, extra_bytes = _ZIP_HEADER.unpack(header)
            member = file.read(name_bytes).decode(errors="replace")
            if method not in _METHODS:
                raise _other_method(path, member, method)
            if not member.endswith("/"):
                return
            file.seek(extra_bytes, os.SEEK_CUR)  # a folder has no content: the next header follows
            header = file.read(_ZIP_HEADER.size)


def _other_method(path: Path, member: str, method: int) -> UserError:
    name = _OTHER_METHODS.get(method, f"method {method}")
    return UserError(
        f"source {path}: {member} is packed by {name}; only stored and deflated members are read: unpack it and name "
        "the folder"
    )


def _not_a_file(path: Path, member: str) -> UserError:
    return UserError(f"source {path}: {member} is a link or a device: pack the images themselves (tar --dereference)")


def _regular_files(path: Path, file: IO[bytes], start: int) -> Iterator[File]:
    """Yield the files of the plain tar that begins at a byte; their positions count from the beginning of the file."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.isreg():
                yield File(member.name.removeprefix("./"), member.offset_data, member.size)
            elif member.isdir():
                yield File(f"{member.name.removeprefix('./')}/", 0, 0)
            else:
                raise _not_a_file(path, member.name)
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
