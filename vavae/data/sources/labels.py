"""Sources with all images in one flat folder and a file of their classes, as ImageNet's validation set comes."""

import io
import posixpath
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vavae.config import written_path
from vavae.data.config import NO_LABELS, RecordKeys
from vavae.data.exclusions import exclusion
from vavae.data.record import Numbering, readable
from vavae.data.sources.listing import Files, Listing, Record, sort_files
from vavae.data.sources.metadata import LABEL_KEY, csv_table, label_or_none
from vavae.errors import UserError

_KAGGLE_HEADER = "ImageId,PredictionString"


@dataclass(frozen=True)
class LabelFile:
    """Classes by the name of the image without its suffix, or in the order of the sorted names."""

    place: str
    """The option that names the file, and its path, for errors."""
    by_name: Mapping[str, int | str | None]
    """Classes by the path of the image in the source, or its last part; None where the file has none."""
    in_order: tuple[str, ...]

    def arrange(self, source: Files) -> Listing:
        """List the images of a flat set.

        Raises:
            UserError: an image that is not in the file, or another number of images than of classes.
        """
        found = sort_files(source, "images")
        images = found.images
        if self.in_order and len(images) != len(self.in_order):
            raise UserError(
                f"{self.place}: {len(self.in_order)} classes for the {len(images)} images of {source.place}"
            )
        values = self.in_order or [self._value(file.path, source.place) for file in images]
        unlabeled = [readable(file.path) for file, value in zip(images, values, strict=True) if value is None]
        numbering = Numbering.of(value for value in values if value is not None)
        records = [
            Record(file.path, numbering.labels[value], file.position, file.size)
            for file, value in zip(images, values, strict=True)
            if value is not None
        ]
        excluded = [*found.excluded, *exclusion("images without a label", unlabeled)]
        return Listing(source.kind, numbering.classes, records, tuple(excluded))

    def _value(self, path: str, source: str) -> int | str | None:
        whole = posixpath.splitext(path)[0]
        stem = posixpath.basename(whole)
        name = whole if whole in self.by_name else stem
        if name not in self.by_name:
            raise UserError(f"{self.place}: no class for {stem} of {source}")
        return self.by_name[name]


def read_label_file(path: Path, field: str, keys: RecordKeys) -> LabelFile:
    """Read a file of classes: a CSV with a header, ImageNet's development kit (.tar.gz), Kaggle's
    `LOC_val_solution.csv`, or a text.

    A line of a text holds the class of the next image in the order of the names, or name and class.

    Args:
        path: the file.
        field: the field of the configuration that names it, for errors.
        keys: the column of the classes of a CSV.

    Raises:
        UserError: it is none of these.
    """
    place = f"{field} {written_path(str(path))}"
    if keys.label == NO_LABELS:
        raise UserError(f"{place}: {LABEL_KEY}={NO_LABELS} takes no labels: leave one of them out")
    if tarfile.is_tarfile(path):
        return LabelFile(place, {}, _devkit_classes(path, place))
    try:
        lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: neither a text nor ImageNet's development kit") from error
    kaggle = bool(lines) and lines[0].strip() == _KAGGLE_HEADER
    if lines and not kaggle:
        table = _of_csv(path, place, keys)
        if table is not None:
            return table
    rows = [line.replace(",", " ").split() for line in lines]
    if kaggle:  # a class and its box, as often as there are objects: all of one class
        rows = [row[:2] for row in rows[1:]]
    widths = {len(row) for row in rows}
    if widths == {1}:
        return LabelFile(place, {}, tuple(row[0] for row in rows))
    if widths == {2}:
        return LabelFile(place, {posixpath.splitext(name)[0]: label for name, label in rows}, ())
    raise UserError(f"{place}: expected a class, or a name and a class, on every line")


def _of_csv(path: Path, place: str, keys: RecordKeys) -> LabelFile | None:
    """The classes in a CSV; None where its first line is no header."""
    table = csv_table(place, path.read_bytes())
    file = table.file_column()
    if file is None or len(table.columns) < 2:
        return None
    label = table.label_column(keys.label)
    others = [name for name in table.columns if name != file]
    if label is None and len(others) > 1:
        raise UserError(f"{place}: several columns, {', '.join(others)}: name that of the classes with {LABEL_KEY}")
    label = label or others[0]
    by_name = {
        posixpath.splitext(str(row[file]))[0]: label_or_none(row[label], f"{place}: {label} of {row[file]}")
        for row in table.rows
    }
    return LabelFile(place, by_name, ())


def _devkit_classes(path: Path, place: str) -> tuple[str, ...]:
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
        raise UserError(f"{place}: not ImageNet's development kit ({error})") from error
