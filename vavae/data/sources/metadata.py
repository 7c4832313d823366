"""Classes and captions of images in files beside them: tables, and the `dataset.json` of StyleGAN and EDM."""

import csv
import io
import json
import posixpath
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from vavae.data.config import NO_LABELS
from vavae.data.record import CAPTION_NAMES, LABEL_NAMES, label_value, only
from vavae.errors import UserError

FILE_NAMES = ("file_name", "filename", "file", "image", "image_id", "imageid", "img", "path", "name", "id")
"""Names of columns, in lower case, that hold the names of images."""

LABEL_KEY = "shards.label_key"


class Described(NamedTuple):
    """Classes and captions of images by their paths in the source."""

    labels: dict[str, int | str | None]
    """Labels or names of classes; None for an image whose label is null or empty."""
    captions: dict[str, str]


class Table(NamedTuple):
    """Rows of a table of images."""

    place: str
    """Its name, for errors."""
    columns: Collection[str]
    rows: Iterable[Mapping[str, Any]]

    def label_column(self, key: str | None) -> str | None:
        """Column of the classes: the named one, or `label`, or the only one that looks like it; None without one.

        Raises:
            UserError: the named one is not there, or several look like it.
        """
        if key == NO_LABELS:
            return None
        if key is not None:
            if key not in self.columns:
                raise UserError(
                    f"{self.place}: no column {key} ({LABEL_KEY}); its columns are {', '.join(self.columns)}"
                )
            return key
        if LABEL_NAMES[0] in self.columns:
            return LABEL_NAMES[0]
        found = [name for name in LABEL_NAMES if name in self.columns]
        return only(found, self.place, "columns of labels", LABEL_KEY) if found else None

    def file_column(self) -> str | None:
        """Column of the names of images; None without one."""
        by_name = {name.lower(): name for name in self.columns}
        return next((by_name[name] for name in FILE_NAMES if name in by_name), None)


def read_metadata(path: str, data: bytes, key: str | None) -> Described:
    """Read a file that describes images, one of `METADATA`.

    Args:
        path: path of the file in the source; names in it are relative to its folder.
        data: its content.
        key: `shards.label_key`.

    Raises:
        UserError: it can't be read, or its column of classes is not there or can't be told.
    """
    return METADATA[posixpath.basename(path)](path, data, key)


def label_or_none(value: Any, what: str) -> int | str | None:
    """Label or name of a class of a table; None where it is null or empty; UserError where it is neither."""
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise UserError(f"{what} is {value!r}; expected a number or a name ({LABEL_KEY}={NO_LABELS} takes no labels)")
    return label_value(value, what)


def csv_table(place: str, data: bytes) -> Table:
    """The table in a CSV with a header; UserError where it is none."""
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{place}: no CSV in UTF-8 ({error})") from error
    return Table(place, [name for name in (rows[0] if rows else {}) if name], rows)


def _of_csv(path: str, data: bytes, key: str | None) -> Described:
    return _of_table(path, csv_table(path, data), key)


def _of_jsonl(path: str, data: bytes, key: str | None) -> Described:
    try:
        rows = [json.loads(line) for line in data.decode().splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{path}: no JSON in every line ({error})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected an object of JSON in every line")
    columns = dict.fromkeys(name for row in rows for name in row)
    return _of_table(path, Table(path, columns, rows), key)


def _of_table(path: str, table: Table, key: str | None) -> Described:
    file, label = table.file_column(), table.label_column(key)
    caption = next((name for name in CAPTION_NAMES if name in table.columns), None)
    if file is None:
        raise UserError(f"{path}: no column with the names of images; its columns are {', '.join(table.columns)}")
    found = Described({}, {})
    for row in table.rows:
        name = _beside(path, row.get(file))
        if label is not None:
            found.labels[name] = label_or_none(row.get(label), f"{path}: {label} of {name}")
        if caption is not None and isinstance(row.get(caption), str):
            found.captions[name] = row[caption]
    return found


def _of_dataset_json(path: str, data: bytes, key: str | None) -> Described:
    try:
        labels = json.loads(data)["labels"]
        pairs = list(labels.items() if isinstance(labels, dict) else labels or ())
        named = {_beside(path, name): value for name, value in pairs}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected {{labels: [[name, label], ...]}} as StyleGAN and EDM write it") from error
    if key == NO_LABELS:
        return Described({}, {})
    return Described({name: label_or_none(value, f"{path}: label of {name}") for name, value in named.items()}, {})


def _beside(path: str, name: Any) -> str:
    """Path in the source of an image that a file names relative to its own folder."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), str(name)))


METADATA: Mapping[str, Callable[[str, bytes, str | None], Described]] = {
    "dataset.json": _of_dataset_json,
    "metadata.csv": _of_csv,
    "metadata.jsonl": _of_jsonl,
}
"""Readers of the files that describe the images of a source, by their names."""
