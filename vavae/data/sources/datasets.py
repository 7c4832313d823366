"""Data sets that come with a package: scikit-learn's digits, Hugging Face `datasets`, torchvision."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from vavae.data.config import NO_LABELS, RecordKeys
from vavae.data.exclusions import exclusions
from vavae.data.image import encode_image
from vavae.data.record import CAPTION_NAMES, LABEL_NAMES, Numbering, label_value, only
from vavae.data.sources.listing import Listing, Record
from vavae.data.sources.metadata import LABEL_KEY
from vavae.errors import UserError

DIGITS_SIZE = 32
_TEXTS = ("string", "large_string")


class DigitsSource:
    """The 1,797 handwritten digits that scikit-learn ships, 8 x 8 in 17 grays, smoothly enlarged to RGB."""

    def __init__(self) -> None:
        digits = _package("sklearn.datasets", "digits", "pip install scikit-learn").load_digits()
        self._images: np.ndarray = digits.images  # [N, 8, 8], 0..16
        self._labels = [int(label) for label in digits.target]

    def listing(self) -> Listing:
        """List all digits, as :class:`~vavae.data.sources.listing.Source` does; the keys look like `7/0042`."""
        return _listing("digits", [str(digit) for digit in range(10)], self._labels)

    def read(self, record: Record) -> bytes:
        """Read one image as a PNG."""
        gray = (self._images[record.position] * (255 / 16)).round().astype(np.uint8)
        image = Image.fromarray(gray).resize((DIGITS_SIZE, DIGITS_SIZE), Image.Resampling.BICUBIC)
        return encode_image(image.convert("RGB"), "png").data


class HuggingFaceSource:
    """A data set of the package `datasets`, by name or folder: a column of images, and those of classes and captions.

    Args:
        name: name or folder of the data set.
        split: its split; "" is `train`.
        keys: the columns of images and classes; None takes the only one that can be meant.

    Raises:
        UserError: there is no such data set or column, or several columns can be meant.
    """

    def __init__(self, name: str, split: str, keys: RecordKeys = RecordKeys()) -> None:  # noqa: B008 - cannot change
        self._kind = f"huggingface:{name}#{split or 'train'}"
        package = _package("datasets", self._kind, "pip install datasets")
        try:
            data = package.load_dataset(name, split=split or "train")
        except (OSError, ValueError) as error:
            raise UserError(f"source {self._kind}: {str(error).splitlines()[0]}") from error
        image = self._image_column(data.features, package.Image, keys.image)
        label = self._label_column(data.features, package.ClassLabel, keys.label)
        names = (name for name in CAPTION_NAMES if name != label and _dtype(data.features.get(name)) in _TEXTS)
        caption = next(names, None)
        images = data.select_columns([image]).cast_column(image, package.Image(decode=False))
        self._images, self._missing = images[image], _missing(images.with_format("arrow")[:][image])
        self._values = None if label is None else data[label]
        self._names = None if label is None else getattr(data.features[label], "names", None)
        self._captions = None if caption is None else data[caption]

    def listing(self) -> Listing:
        """List all images, as :class:`~vavae.data.sources.listing.Source` does; the keys are class and row."""
        values = None if self._values is None else [*self._values]
        kept: list[int] = []
        left_out: dict[str, list[str]] = {"rows without an image": [], "rows without a label": []}
        for row, missing in enumerate(self._missing.tolist()):
            if missing:
                left_out["rows without an image"].append(f"row {row}")
            elif values is not None and values[row] is None:
                left_out["rows without a label"].append(f"row {row}")
            else:
                kept.append(row)
        classes: tuple[str, ...] = ()
        labels = [0] * len(kept)
        if values is not None and self._names is not None:
            classes, labels = tuple(self._names), [int(values[row]) for row in kept]
        elif values is not None:
            what = f"source {self._kind}: a label"
            found = [label_value(values[row], what) for row in kept]
            numbering = Numbering.of(found)
            classes, labels = numbering.classes, [numbering.labels[value] for value in found]
        listing = _listing(self._kind, classes, labels, kept)
        if self._captions is not None:
            texts = [*self._captions]
            records = [record._replace(caption=texts[record.position]) for record in listing.records]
            listing = replace(listing, records=records)
        return replace(listing, excluded=tuple(exclusions(left_out)))

    def read(self, record: Record) -> bytes:
        """Read one image file as the data set stores it."""
        image = self._images[record.position]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()

    def _image_column(self, features: Mapping[str, Any], kind: type, key: str | None) -> str:
        names = [name for name, feature in features.items() if isinstance(feature, kind)]
        if not names or (key is not None and key not in names):
            wanted = "no column is an image" if key is None else f"{key} (shards.image_key) is no column of images"
            raise UserError(f"source {self._kind}: {wanted}; its columns are {', '.join(features)}")
        return key or only(names, f"source {self._kind}", "columns of images", "shards.image_key")

    def _label_column(self, features: Mapping[str, Any], kind: type, key: str | None) -> str | None:
        """The column of the classes: of class labels, or of numbers or texts with a telling name."""
        if key == NO_LABELS:
            return None
        usable = [name for name, feature in features.items() if isinstance(feature, kind) or _is_plain(feature)]
        if key is not None:
            if key not in usable:
                raise UserError(
                    f"source {self._kind}: {key} (shards.label_key) is no column of numbers or texts; its columns are "
                    f"{', '.join(features)}"
                )
            return key
        if LABEL_NAMES[0] in usable:
            return LABEL_NAMES[0]
        names = [name for name in usable if isinstance(features[name], kind)]
        names = names or [name for name in usable if name in LABEL_NAMES]
        return only(names, f"source {self._kind}", "columns of labels", "shards.label_key") if names else None


class TorchvisionSource:
    """A classification set of torchvision by its class name, fetched into `folder` where it can be fetched."""

    def __init__(self, name: str, split: str, folder: Path) -> None:
        self._kind = f"torchvision:{name}#{split or 'train'}"
        importlib.import_module("vavae.torchvision_compat")  # here, because it loads torch
        package = _package("torchvision.datasets", self._kind, "pip install torchvision")
        maker = getattr(package, name, None)
        if not inspect.isclass(maker):
            raise UserError(f"source {self._kind}: torchvision.datasets has no class {name}")
        options = {"root": str(folder), "train": split in ("", "train"), "split": split or "train", "download": True}
        known = inspect.signature(maker).parameters
        try:
            self._data: Any = maker(**{key: value for key, value in options.items() if key in known})
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"source {self._kind}: {str(error).splitlines()[0]}") from error

    def listing(self) -> Listing:
        """List all images, as :class:`~vavae.data.sources.listing.Source` does; the keys are class and index."""
        named = next((name for name in ("targets", "labels", "_labels") if hasattr(self._data, name)), None)
        found = getattr(self._data, named) if named else self._labels_one_by_one()
        labels = [int(label) for label in found]
        classes = getattr(self._data, "classes", None) or [str(label) for label in range(max(labels) + 1)]
        return _listing(self._kind, [_class_name(name) for name in classes], labels)

    def read(self, record: Record) -> bytes:
        """Read one image as a PNG, because torchvision hands out pixels."""
        return encode_image(self._data[record.position][0].convert("RGB"), "png").data

    def _labels_one_by_one(self) -> list[int]:
        return [self._data[index][1] for index in range(len(self._data))]


def _listing(
    kind: str, classes: Sequence[str], labels: Sequence[int], positions: Sequence[int] | None = None
) -> Listing:
    """Listing of a set that is an array of images and an array of labels; no classes make one without labels.

    Args:
        kind: kind and name of the source.
        classes: names of the classes.
        labels: label of each image.
        positions: index of each image; None counts them.
    """
    if not labels:
        raise UserError(f"source {kind}: no images")
    if min(labels) < 0:
        raise UserError(f"source {kind}: this split has no labels; name one that has, or set {LABEL_KEY}={NO_LABELS}")
    positions = range(len(labels)) if positions is None else positions
    digits = len(str(positions[-1]))
    names = [f"{name}/" for name in classes] or [""]
    records = [
        Record(f"{names[label]}{at:0{digits}d}", label, at, 0) for at, label in zip(positions, labels, strict=True)
    ]
    return Listing(kind, tuple(classes), records)


def _missing(column: Any) -> np.ndarray:
    """Return which rows of a column of images, of PyArrow, are null: bool [N]. No image is read."""
    found = [np.zeros(0, bool)]
    for chunk in column.chunks:
        empty = [chunk.field(name).is_null().to_numpy(zero_copy_only=False) for name in ("bytes", "path")]
        found.append(chunk.is_null().to_numpy(zero_copy_only=False) | (empty[0] & empty[1]))
    return np.concatenate(found)


def _dtype(feature: object) -> str:
    """Type of the values of a column; "" for what has none."""
    return str(getattr(feature, "dtype", ""))


def _is_plain(feature: object) -> bool:
    """Return whether a column holds whole numbers or texts."""
    return _dtype(feature) in _TEXTS or _dtype(feature).startswith(("int", "uint"))


def _class_name(name: object) -> str:
    """Name of a class; the first synonym of ImageNet's tuples."""
    return str(name[0] if isinstance(name, tuple) else name)


def _package(name: str, source: str, remedy: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"source {source!r} needs a package that is not here ({error}): {remedy}") from error
