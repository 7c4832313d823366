"""Opening of sources by name."""

import re
import tarfile
import zipfile
from functools import lru_cache, partial
from pathlib import Path

from vavae.config import written_path
from vavae.data.config import NO_LABELS, RecordKeys
from vavae.data.shards.manifest import MANIFEST
from vavae.data.sources.datasets import DigitsSource, HuggingFaceSource, TorchvisionSource
from vavae.data.sources.files import FolderSource, TarSource, ZipSource, check_packing
from vavae.data.sources.labels import LabelFile, read_label_file
from vavae.data.sources.listing import Arrange, Source, list_class_folders
from vavae.errors import UserError
from vavae.storage.config import StorageOptions
from vavae.storage.storage import Storage

INDEXED = "indexed"
"""Kind of a source that is a manifest of shards made by others."""

_ARCHIVE_AND_FOLDER = re.compile(r"(.+\.(?:zip|tar|tar\.gz|tgz))#(.+)")


def open_source(
    name: str,
    storage: Storage,
    labels: str | None = None,
    keys: RecordKeys = RecordKeys(),  # noqa: B008 - it cannot be changed
    labels_field: str = "labels",
) -> Source:
    """Open a source by the name that :class:`~vavae.data.config.ShardsConfig` documents.

    Args:
        name: path, URL, or name of a data set.
        storage: whose options say how a store is reached, and whose cache takes what has to be fetched.
        labels: path or URL of a file with the classes of images that lie in no class folders.
        keys: columns of the images and of their classes.
        labels_field: the field of the configuration that names `labels`, for errors.

    Raises:
        UserError: nothing is there, or it is neither a folder nor an archive, or its package is missing.
    """
    kind, _, rest = name.partition(":")
    if labels is not None and (name == "digits" or kind in (INDEXED, "huggingface", "torchvision")):
        raise UserError(f"{labels_field} {written_path(labels)}: {name} brings its classes along; leave the option out")
    if kind == INDEXED:  # opened to see that it is there; its shards are taken as they are
        return FolderSource(_index(rest, storage, written_path(name)))
    if (name == "digits" or kind == "torchvision") and (keys.image or keys.label not in (None, NO_LABELS)):
        field, value = ("image_key", keys.image) if keys.image else ("label_key", keys.label)
        raise UserError(f"shards.{field}={value}: {name} has no columns; leave the field out")
    if name == "digits":
        return DigitsSource()
    if kind in ("huggingface", "torchvision"):
        data_set, _, split = rest.partition("#")
        if kind == "huggingface":
            return HuggingFaceSource(data_set, split, keys)
        return TorchvisionSource(data_set, split, storage.cache_folder / "torchvision")
    if labels is not None:
        return _open_files(name, storage, _read_labels(labels, storage, labels_field, keys).arrange)
    return _open_files(name, storage, partial(list_class_folders, keys=keys))


def reopen_source(name: str, storage: Storage, fingerprint: str, keys: RecordKeys) -> Source:
    """Return an open source for reading many shards in one process; another content is another source."""
    return _reopen(name, storage.cache, storage.options, fingerprint, keys)


@lru_cache(maxsize=2)
def _reopen(name: str, cache: str | None, options: StorageOptions, fingerprint: str, keys: RecordKeys) -> Source:
    return open_source(name, Storage(".", cache, options), keys=keys)


def _index(folder: str, storage: Storage, source: str) -> Storage:
    place = storage.at(folder)
    if not place.exists(MANIFEST):
        raise UserError(f"source {source}: no {MANIFEST} there; write it with `vavae data index`")
    return place


def _read_labels(name: str, storage: Storage, field: str, keys: RecordKeys) -> LabelFile:
    place = storage.at(name)
    if not place.is_file():
        raise UserError(f"{field} {written_path(name)!r} is not there: name the file with the classes")
    return read_label_file(place.local_file(), field, keys)


def _open_files(name: str, storage: Storage, arrange: Arrange) -> Source:
    match = _ARCHIVE_AND_FOLDER.fullmatch(name)
    archive, inside = match.groups() if match else (name, "")
    place = storage.at(archive)
    if not place.exists():
        raise UserError(
            f"source {written_path(name)!r} is not there: give a folder of images or of class folders, a .zip or "
            ".tar(.gz) of one, 'digits', 'huggingface:<name>' or 'torchvision:<Class>'"
        )
    if place.is_file():
        return _open_archive(place.local_file(), inside.strip("/"), arrange)
    return FolderSource(place, arrange)


def _open_archive(path: Path, inside: str, arrange: Arrange) -> Source:
    check_packing(path)
    if zipfile.is_zipfile(path):
        return ZipSource(path, inside, arrange)
    if tarfile.is_tarfile(path):
        return TarSource(path, inside, arrange)
    raise UserError(f"source {path}: neither a folder nor a zip nor a tar archive")
