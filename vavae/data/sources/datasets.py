"""Data sets that come with a package: scikit-learn's digits, Hugging Face `datasets`, torchvision."""

import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from vavae.data.image import encode_image
from vavae.data.sources.listing import Listing, Record
from vavae.errors import UserError

DIGITS_SIZE = 32


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
    """A data set of the package `datasets`, by name or folder: its first image column and its class label."""

    def __init__(self, name: str, split: str) -> None:
        self._kind = f"huggingface:{name}#{split or 'train'}"
        package = _package("datasets", self._kind, "pip install datasets")
        try:
            data = package.load_dataset(name, split=split or "train")
        except (OSError, ValueError) as error:
            raise UserError(f"source {self._kind}: {str(error).splitlines()[0]}") from error
        image = self._column(data.features, package.Image, "image")
        self._label = self._column(data.features, package.ClassLabel, "class label")
        self._classes = list(data.features[self._label].names)
        self._labels = [int(label) for label in data[self._label]]
        self._images = data.select_columns([image]).cast_column(image, package.Image(decode=False))[image]

    def listing(self) -> Listing:
        """List all images, as :class:`~vavae.data.sources.listing.Source` does; the keys are class and row."""
        return _listing(self._kind, self._classes, self._labels)

    def read(self, record: Record) -> bytes:
        """Read one image file as the data set stores it."""
        image = self._images[record.position]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()

    def _column(self, features: dict[str, Any], kind: type, noun: str) -> str:
        names = [name for name, feature in features.items() if isinstance(feature, kind)]
        if not names:
            raise UserError(f"source {self._kind}: no column is a {noun}; its columns are {', '.join(features)}")
        return "label" if "label" in names else names[0]


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


def _listing(kind: str, classes: Sequence[str], labels: Sequence[int]) -> Listing:
    """Listing of a set that is an array of images and an array of labels."""
    if not labels:
        raise UserError(f"source {kind}: no images")
    if min(labels) < 0:
        raise UserError(f"source {kind}: this split has no labels; name one that has")
    digits = len(str(len(labels) - 1))
    records = [Record(f"{classes[label]}/{index:0{digits}d}", label, index, 0) for index, label in enumerate(labels)]
    return Listing(kind, tuple(classes), records)


def _class_name(name: object) -> str:
    """Name of a class; the first synonym of ImageNet's tuples."""
    return str(name[0] if isinstance(name, tuple) else name)


def _package(name: str, source: str, remedy: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"source {source!r} needs a package that is not here ({error}): {remedy}") from error
