"""Listings of sources: names, classes and sizes of images before any of them is read."""

import hashlib
import json
import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, Protocol

from pydantic import JsonValue

from vavae.data.config import NO_LABELS, RecordKeys
from vavae.data.exclusions import Exclusion, exclusion, exclusions
from vavae.data.image import IMAGE_SUFFIXES, UNDECODABLE_SUFFIXES
from vavae.data.record import Numbering, readable
from vavae.data.sources.metadata import LABEL_KEY, METADATA, read_metadata
from vavae.errors import UserError

_SYSTEM = frozenset(
    name
    for names in (
        ("@eadir", "@tmp", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot", "$recycle.bin"),
        ("recycler", "lost+found", "found.000", "system volume information", "network trash folder"),
        ("temporary items", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    )
    for name in names
)
"""Names, in lower case, of folders and files that file managers and NAS make by themselves."""
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test"))


Fingerprint = dict[str, JsonValue]
"""Plain values that differ where two sources differ."""


class Record(NamedTuple):
    """One image of a source, not yet read."""

    key: str
    """Name in the source, with "/" between the parts."""
    label: int
    """Index of the class; 0 in a source without classes."""
    position: int
    """Byte offset or index at which the source finds the image; 0 in sources that go by the key."""
    size: int
    """Size in bytes, as far as the source knows without reading; otherwise 0."""
    caption: str | None = None
    """Text on the image; None where there is none."""


@dataclass(frozen=True)
class Listing:
    """The images of a source in a fixed order. Names and sizes only, never pixels: some 300 bytes an image."""

    kind: str
    classes: tuple[str, ...]
    """Names of the classes; none for images without labels."""
    records: Sequence[Record]
    excluded: tuple[Exclusion, ...] = ()
    """Files and images of the source that are left out, by the reason."""

    @property
    def fingerprint(self) -> Fingerprint:
        """Digest of names, classes, sizes and captions, with the kind, the classes and the number of images."""
        names: Iterable[tuple[str | int, ...]] = (
            (record.key, record.label, record.size, *([] if record.caption is None else [record.caption]))
            for record in self.records
        )
        images = len(self.records)
        return {"kind": self.kind, "classes": [*self.classes], "images": images, "digest": digest_of_rows(names)}

    def without_labels(self) -> "Listing":
        """The same images without labels."""
        return replace(self, classes=(), records=[record._replace(label=0) for record in self.records])


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


class File(NamedTuple):
    """A file in a folder or an archive; the path of a folder ends in "/"."""

    path: str
    position: int
    size: int


class Files(NamedTuple):
    """The files of a source."""

    kind: str
    """Kind of source that holds them."""
    place: str
    """Its name, for errors."""
    files: Iterable[File]
    read: Callable[[File], bytes]
    """Reads one of them."""
    inside: str = ""
    """The folder to stay within; "" for all."""
    excluded: Sequence[Exclusion] = ()
    """Files that the source has left out already, by the reason."""


Arrange = Callable[[Files], Listing]
"""Arranges files by class."""


class Sorted(NamedTuple):
    """The files of a source by what they are."""

    images: list[File]
    """Image files, in the order of their paths."""
    metadata: list[File]
    others: list[str]
    """Paths of visible files and folders that are neither."""
    excluded: list[Exclusion]


def list_class_folders(source: Files, keys: RecordKeys = RecordKeys()) -> Listing:  # noqa: B008 - it cannot be changed
    """Arrange files by the classes that a file beside them names, or by class folder, or take them without labels.

    Class folders are `class/.../name.jpg`, beneath any number of folders that wrap all classes. Images that all lie in
    one folder, which is the source or a split of it, or is described by a file without labels, have no labels.

    Args:
        source: the files; those that are no images, and hidden ones, are left out.
        keys: the column of the classes.
    """
    found = sort_files(source, "name.jpg or class/name.jpg (or .png, ...)")
    described = [read_metadata(file.path, source.read(file), keys.label) for file in found.metadata]
    captions = {name: text for each in described for name, text in each.captions.items()}
    labels = {name: label for each in described for name, label in each.labels.items()}
    if keys.label == NO_LABELS:
        listing = _unlabeled(source, found)
    elif labels:
        listing = _by_metadata(source, found, labels)
    elif keys.label is not None:
        raise UserError(
            f"source {source.place}: no {', '.join(sorted(METADATA))} with a column {keys.label} ({LABEL_KEY})"
        )
    else:
        listing = _by_folder(source, found)
        if described and len(listing.classes) == 1:  # the folder of images of a table of captions
            listing = listing.without_labels()
    if not captions:
        return listing
    records = [record._replace(caption=captions.get(record.key)) for record in listing.records]
    return replace(listing, records=records)


def _unlabeled(source: Files, found: Sorted) -> Listing:
    records = [Record(file.path, 0, file.position, file.size) for file in found.images]
    return Listing(source.kind, (), records, tuple(found.excluded))


def _by_metadata(source: Files, found: Sorted, labels: dict[str, int | str | None]) -> Listing:
    _refuse_splits(source, {_part(file, _wrapping_folders(found.images)) for file in found.images})
    numbering = Numbering.of(label for label in labels.values() if label is not None)
    records, unlabeled = [], []
    for file in found.images:
        label = labels.get(file.path)
        if label is None:
            unlabeled.append(readable(file.path))
        else:
            records.append(Record(file.path, numbering.labels[label], file.position, file.size))
    if not records:
        names = ", ".join(file.path for file in found.metadata)
        raise UserError(f"source {source.place}: {names} names none of its images, such as {found.images[0].path}")
    excluded = [*found.excluded, *exclusion("images without a label", unlabeled)]
    return Listing(source.kind, numbering.classes, records, tuple(excluded))


def _by_folder(source: Files, found: Sorted) -> Listing:
    images, place = found.images, source.place
    depth = max(len(source.inside.split("/")) if source.inside else 0, _wrapping_folders(images))
    while all(file.path.count("/") > depth and _part(file, depth) == _part(images[0], depth) for file in images):
        if _part(images[0], depth) not in _SPLITS:
            break
        depth += 1
    stray = [file.path for file in images if file.path.count("/") <= depth]
    if len(stray) == len(images):
        return _unlabeled(source, found)
    if stray:
        raise UserError(
            f"source {place}: {stray[0]} lies in no class folder; arrange the images as class/name.jpg, or take them "
            f"without labels ({LABEL_KEY}={NO_LABELS})"
        )
    folders = sorted({_part(file, depth) for file in images})
    _refuse_splits(source, folders)
    labels = {name: label for label, name in enumerate(folders)}
    records = [Record(file.path, labels[_part(file, depth)], file.position, file.size) for file in images]
    wrap = "".join(f"{part}/" for part in images[0].path.split("/")[:depth])
    others = {path.split("/")[depth] for path in found.others if path.startswith(wrap) and path.count("/") > depth}
    empty = exclusion("folders without an image", [readable(name) for name in sorted(others.difference(folders))])
    return Listing(source.kind, tuple(map(readable, folders)), records, (*found.excluded, *empty))


def _refuse_splits(source: Files, folders: Iterable[str]) -> None:
    names = sorted(folders)
    if len(names) > 1 and _SPLITS.issuperset(names):
        raise UserError(
            f"source {source.place}: {', '.join(names)} are splits, not classes; name one of them as the source and "
            "another as the validation source (after an archive: #train)"
        )


def sort_files(source: Files, expected: str) -> Sorted:
    """Tell the images of a source from its other files; UserError where there are no images, or two of one name.

    Nothing is ever unpacked, but the names go into the shards: one that leads out of the archive is an error too.

    Args:
        source: the files.
        expected: what it must hold, for errors.
    """
    images: list[File] = []
    metadata: list[File] = []
    others: list[str] = []
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    for file in _within(source):
        base = posixpath.basename(file.path)
        suffix = posixpath.splitext(base)[1].lower()
        if any(part.startswith((".", "__MACOSX")) or part.lower() in _SYSTEM for part in file.path.split("/")):
            if suffix in IMAGE_SUFFIXES:
                left_out["images that are hidden, or in folders of the system"].append(file.path)
        elif suffix in IMAGE_SUFFIXES:
            images.append(file)
        elif base in METADATA:
            metadata.append(file)
        else:
            others.append(file.path)
            if suffix in UNDECODABLE_SUFFIXES:
                left_out[f"files of {suffix}, which nothing here decodes (pip install 'vavae[formats]')"].append(
                    file.path
                )
            elif base:
                left_out["files that are no images by their names"].append(file.path)
    place, inside = source.place, source.inside
    excluded = exclusions({reason: [*map(readable, sorted(names))] for reason, names in left_out.items()})
    if not images:
        found = "".join(f"; {each}" for each in excluded)
        raise UserError(f"source {place}: no images{inside and f' in {inside}/'}; it must hold {expected}{found}")
    images.sort()
    twin = next((file.path for file, after in pairwise(images) if file.path == after.path), None)
    if twin:
        raise UserError(f"source {place}: {twin} comes twice; pack it again with each file once")
    return Sorted(images, sorted(metadata), others, [*source.excluded, *excluded])


def _within(source: Files) -> Iterator[File]:
    folder = source.inside and f"{source.inside}/"
    for file in source.files:
        if file.path.startswith("/") or (".." in file.path and ".." in file.path.split("/")):
            raise UserError(
                f"source {source.place}: {file.path} leads out of the archive; pack it again from inside its folder"
            )
        if file.path.startswith(folder):
            yield file


def _part(file: File, depth: int) -> str:
    return file.path.split("/", depth + 1)[depth]


def _wrapping_folders(files: list[File]) -> int:
    """Number of leading folders common to all files that leave a class folder and a name below them."""
    depth = 0
    while all(file.path.count("/") > depth + 1 and _part(file, depth) == _part(files[0], depth) for file in files):
        depth += 1
    return depth
