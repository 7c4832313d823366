"""Sources with all images in one flat folder and a file of their classes, as ImageNet's validation set comes."""

import io
import posixpath
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vavae.data.sources.listing import File, Listing, Record, images_among
from vavae.errors import UserError

_KAGGLE_HEADER = "ImageId,PredictionString"


@dataclass(frozen=True)
class LabelFile:
    """Classes by the name of the image without its suffix, or in the order of the sorted names."""

    place: str
    by_name: dict[str, str]
    in_order: tuple[str, ...]

    def arrange(self, kind: str, place: str, files: Iterable[File], inside: str = "") -> Listing:
        """List the images of a flat set; arguments as of :func:`~vavae.data.sources.listing.list_class_folders`.

        Raises:
            UserError: an image without a class, or another number of images than of classes.
        """
        images = images_among(files, place, inside, "images")
        stems = [posixpath.splitext(posixpath.basename(file.path))[0] for file in images]
        if self.in_order and len(images) != len(self.in_order):
            raise UserError(
                f"validation_labels {self.place}: {len(self.in_order)} classes for the {len(images)} images of {place}"
            )
        stray = None if self.in_order else next((stem for stem in stems if stem not in self.by_name), None)
        if stray:
            raise UserError(f"validation_labels {self.place}: no class for {stray} of {place}")
        names = self.in_order or [self.by_name[stem] for stem in stems]
        classes = tuple(sorted(set(names)))
        labels = {name: label for label, name in enumerate(classes)}
        records = [
            Record(file.path, labels[name], file.position, file.size) for file, name in zip(images, names, strict=True)
        ]
        return Listing(kind, classes, records)


def read_label_file(path: Path) -> LabelFile:
    """Read a file of classes: ImageNet's development kit (.tar.gz), Kaggle's `LOC_val_solution.csv`, or a text.

    A line of a text holds the class of the next image in the order of the names, or name and class.

    Raises:
        UserError: it is none of these.
    """
    if tarfile.is_tarfile(path):
        return LabelFile(str(path), {}, _devkit_classes(path))
    try:
        rows = [line.replace(",", " ").split() for line in path.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"validation_labels {path}: neither a text nor ImageNet's development kit") from error
    kaggle = bool(rows) and ",".join(rows[0]) == _KAGGLE_HEADER
    if kaggle:  # a class and its box, as often as there are objects: all of one class
        rows = [row[:2] for row in rows[1:]]
    widths = {len(row) for row in rows}
    if widths == {1}:
        return LabelFile(str(path), {}, tuple(row[0] for row in rows))
    if widths == {2}:
        return LabelFile(str(path), {posixpath.splitext(name)[0]: label for name, label in rows}, ())
    raise UserError(f"validation_labels {path}: expected a class, or a name and a class, on every line")


def _devkit_classes(path: Path) -> tuple[str, ...]:
    """WordNet ids in the order of the validation images: the kit numbers its classes in an order of its own."""
    try:
        with tarfile.open(path) as kit:
            inside = {posixpath.basename(name): name for name in kit.getnames()}
            meta, truth = (
                kit.extractfile(inside[name]).read()  # type: ignore[union-attr]
                for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
            )
        from scipy.io import loadmat  # a large import, for the kit of ImageNet alone

        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if not row["num_children"]}
        return tuple(names[int(line)] for line in truth.split())
    except (KeyError, ValueError, tarfile.TarError) as error:
        raise UserError(f"validation_labels {path}: not ImageNet's development kit ({error})") from error
