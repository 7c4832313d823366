"""Listings of sources: names, classes and sizes of images before any of them is read."""

import hashlib
import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

from pydantic import JsonValue

from vavae.errors import UserError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
)
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test"))


Fingerprint = dict[str, JsonValue]
"""Plain values that differ where two sources differ."""


class Record(NamedTuple):
    """One image of a source, not yet read."""

    key: str
    """Name in the source, with "/" between the parts."""
    label: int
    """Index of the class."""
    position: int
    """Byte offset or index at which the source finds the image; 0 in sources that go by the key."""
    size: int
    """Size in bytes, as far as the source knows without reading; otherwise 0."""


@dataclass(frozen=True)
class Listing:
    """The images of a source in a fixed order. Names and sizes only, never pixels: some 300 bytes an image."""

    kind: str
    classes: tuple[str, ...]
    records: Sequence[Record]

    @property
    def fingerprint(self) -> Fingerprint:
        """Digest of names, classes and sizes, with the kind, the classes and the number of images."""
        names = ((record.key, record.label, record.size) for record in self.records)
        images = len(self.records)
        return {"kind": self.kind, "classes": [*self.classes], "images": images, "digest": digest_of_rows(names)}


def digest_of_rows(rows: Iterable[tuple[str | int, ...]]) -> str:
    """`vavae.config.digest` of a list of rows that need not be in memory together."""
    encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
    state, comma = hashlib.sha256(b"["), ""
    for row in rows:
        state.update((comma + encode(row)).encode(errors="surrogateescape"))
        comma = ","
    state.update(b"]")
    return state.hexdigest()


class Source(Protocol):
    """Images with random access. Opening one is cheap where that can be; listing it is not."""

    def listing(self) -> Listing:
        """List all images; UserError where they are not arranged in classes, or where there are none."""

    def read(self, record: Record) -> bytes:
        """Read the bytes of an image file as the source has them; UserError where the source is damaged."""


class Arrange(Protocol):
    """A function that arranges files by class."""

    def __call__(self, kind: str, place: str, files: Iterable["File"], inside: str = "") -> Listing:
        """Arrange files by class; arguments as of `list_class_folders`."""


class File(NamedTuple):
    """A file in a folder or an archive."""

    path: str
    position: int
    size: int


def list_class_folders(kind: str, place: str, files: Iterable[File], inside: str = "") -> Listing:
    """Arrange files by class folder: `class/.../name.jpg`, beneath any number of folders that wrap all classes.

    Args:
        kind: kind of source that holds the files.
        place: its name, for errors.
        files: all files in it; those that are no images, and hidden ones, are left out.
        inside: the folder to stay within; "" for all.
    """
    images = images_among(files, place, inside, "class/name.jpg (or .png, ...)")
    depth = _wrapping_folders(images)
    stray = next((file.path for file in images if file.path.count("/") <= depth), None)
    if stray:
        raise UserError(f"source {place}: {stray} lies in no class folder; arrange the images as class/name.jpg")
    classes = sorted({_part(file, depth) for file in images})
    if len(classes) > 1 and _SPLITS.issuperset(classes):
        raise UserError(
            f"source {place}: {', '.join(classes)} are splits, not classes; name one of them as the source and "
            "another as the validation source (after an archive: #train)"
        )
    labels = {name: label for label, name in enumerate(classes)}
    records = [Record(file.path, labels[_part(file, depth)], file.position, file.size) for file in images]
    return Listing(kind, tuple(classes), records)


def images_among(files: Iterable[File], place: str, inside: str, expected: str) -> list[File]:
    """The images within a folder of a source, sorted; UserError where there are none, or two of one name.

    Nothing is ever unpacked, but the names go into the shards: one that leads out of the archive is an error too.
    """
    images = sorted(
        file for file in _within(files, place) if _is_image(file.path) and file.path.startswith(inside and f"{inside}/")
    )
    if not images:
        raise UserError(f"source {place}: no images{inside and f' in {inside}/'}; it must hold {expected}")
    twin = next((file.path for file, after in pairwise(images) if file.path == after.path), None)
    if twin:
        raise UserError(f"source {place}: {twin} comes twice; pack it again with each file once")
    return images


def _within(files: Iterable[File], place: str) -> Iterator[File]:
    for file in files:
        if file.path.startswith("/") or (".." in file.path and ".." in file.path.split("/")):
            raise UserError(
                f"source {place}: {file.path} leads out of the archive; pack it again from inside its folder"
            )
        yield file


def _is_image(path: str) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.split("/"))
    return not hidden and posixpath.splitext(path)[1].lower() in IMAGE_SUFFIXES


def _part(file: File, depth: int) -> str:
    return file.path.split("/", depth + 1)[depth]


def _wrapping_folders(files: list[File]) -> int:
    """Number of leading folders common to all files that leave a class folder and a name below them."""
    depth = 0
    while all(file.path.count("/") > depth + 1 and _part(file, depth) == _part(files[0], depth) for file in files):
        depth += 1
    return depth
