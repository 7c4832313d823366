"""Members of a record of an image shard: which of them is the image, the class and the caption."""

import json
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple, TypeVar

from vavae.data.config import NO_LABELS, RecordKeys
from vavae.data.image import IMAGE_SUFFIXES
from vavae.errors import UserError

LABEL = "cls"
"""Member with the class of a record, where no other is named."""

LABEL_NAMES = ("label", "labels", "class", "class_id", "class_label", "class_name")
"""Names of columns and keys that are taken for the class where `shards.label_key` names none."""
CAPTION_NAMES = ("caption", "text", "prompt")
"""Names of columns and keys that are taken for the caption."""
CAPTION = "txt"
"""Member with the caption of a record."""

MAX_CLASSES = 1_000_000
"""Label above which a number is no index of a class."""

_LABEL_FILES = frozenset((LABEL, "label"))
_JSON = "json"
_PLACE = "a record"

T = TypeVar("T")


class RecordReader:
    """The image and the class of records, by the keys and classes of one set of shards.

    Args:
        keys: members that hold them; None as :func:`find_image` and `cls` say.
        classes: names of the classes, in the order of their labels; none for images without labels.
        by_name: whether records hold names of classes, not their labels.
    """

    def __init__(self, keys: RecordKeys, classes: Collection[str], by_name: bool = False) -> None:
        self._keys, self._count = keys, len(classes)
        self._labels = {name: label for label, name in enumerate(classes)} if by_name else None

    def image(self, record: Mapping[str, bytes], place: str = _PLACE) -> bytes:
        """Encoded image of a record; UserError with its place where there is none, or more than one."""
        return record[find_image(record, place, self._keys.image)]

    def label(self, record: Mapping[str, bytes], place: str = _PLACE) -> int:
        """Label of a record, 0 in a set without classes; UserError with its place where it has none of them."""
        if not self._count:
            return 0
        key = self._keys.label or LABEL
        value = read_label(record, key, place)
        if value is None:
            raise UserError(f"{place}: its class {key} is null; index the shards again, which leaves such records out")
        if self._labels is not None:
            name = str(value)
            if name not in self._labels:
                raise UserError(f"{place}: its class {name!r} is none of the manifest's; index the shards again")
            return self._labels[name]
        if not isinstance(value, int):
            raise UserError(f"{place}: its class is {value[:20]!r}; expected a number from 0 to {self._count - 1}")
        if value >= self._count:
            raise UserError(
                f"{place}: label {value}, but the manifest has {self._count} classes; make the shards again"
            )
        return value


def find_image(record: Collection[str], place: str = _PLACE, key: str | None = None) -> str:
    """Member of a record with its image.

    A member named by its format alone, such as `jpg`, comes before longer names, such as `seg.png`.

    Args:
        record: names of its members.
        place: of the record, for errors.
        key: the member; None takes the only one.

    Raises:
        UserError: there is none, or several.
    """
    if key is not None:
        if key in record:
            return key
        raise UserError(f"{place}: no member {key} (shards.image_key); its members are {sorted(record)}")
    names = _images_among(tuple(record))
    if len(names) == 1:
        return names[0]
    if names:
        raise UserError(f"{place}: several images, {_listed(names)}: name one of them with shards.image_key")
    raise UserError(f"{place}: without an image: its members are {sorted(record)}; expected png, jpg, jpeg or webp")


@lru_cache(maxsize=256)
def _images_among(members: tuple[str, ...]) -> tuple[str, ...]:
    images = [name for name in members if f".{name.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    return tuple([name for name in images if "." not in name] or images)


def find_label(record: Mapping[str, bytes], place: str, key: str | None) -> str | None:
    """Key of the class of a record, and of all records of its set; None where it has none.

    Args:
        record: its members.
        place: of the record, for errors.
        key: `shards.label_key`; None takes the only member or key of `json` that looks like one, members first.

    Raises:
        UserError: there are several.
    """
    if key is not None:
        return None if key == NO_LABELS else key
    found = [name for name in record if name.rpartition(".")[2] in _LABEL_FILES]
    if not found:
        values = _json(record, place)
        present = [name for name in LABEL_NAMES if isinstance(values.get(name, ()), (int, str, type(None)))]
        names = [name for name in present if values[name] is not None] or present
        found = [f"{_JSON}.{name}" for name in (names[:1] if LABEL_NAMES[0] in names else names)]
    return only(found, place, "labels", "shards.label_key") if found else None


def read_label(record: Mapping[str, bytes], key: str, place: str) -> int | str | None:
    """Label or name of the class of a record, by the key of a member or `json.<key>`; None where that is null.

    Raises:
        UserError: the record has no such member or key, or no label or name there.
    """
    member, _, name = key.partition(".")
    if member == _JSON and name:
        values = _json(record, place)
        value = values.get(name)
        if name in values and value is None:
            return None
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            return label_value(value, f"{place}: its {key}")
        raise UserError(f"{place}: its class {key} is {value!r}; expected a number or a name (shards.label_key)")
    data = record.get(key, b"")
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        text = ""
    if not text or not text.isprintable():
        raise UserError(f"{place}: its class is {data[:20]!r}; expected a member {key} with a number or a name")
    return label_value(text, f"{place}: its class")


def label_value(value: int | str, what: str) -> int | str:
    """Label of a class, where a value is a number, or its name; UserError for a negative or an absurd number."""
    try:
        number = int(value)
    except ValueError:
        return str(value).strip()
    if not 0 <= number < MAX_CLASSES:
        raise UserError(f"{what} is {str(value)!r}; expected a number from 0 to {MAX_CLASSES - 1:,}, or a name")
    return number


def name_of(record: Mapping[str, bytes], key: str) -> str:
    """Name of a record as its source calls it: `key` of its `json`, where this project wrote that, or its own key."""
    name = _json(record, key).get("key")
    return name if isinstance(name, str) else readable(key)


def caption_of(record: Mapping[str, bytes]) -> str | None:
    """Caption of a record: its member `txt`, or the key `caption` of its `json`; None where it has neither."""
    if CAPTION in record:
        return record[CAPTION].decode(errors="replace")
    value = _json(record, "").get("caption") if _JSON in record else None
    return value if isinstance(value, str) else None


def readable(name: str) -> str:
    """A name as text that can be written: bytes that are not UTF-8 become escapes such as `caf\\xe9`."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


class Numbering(NamedTuple):
    """Classes of a set, and the label of each of its values."""

    classes: tuple[str, ...]
    labels: dict[int | str, int]

    @classmethod
    def of(cls, values: Iterable[int | str]) -> "Numbering":
        """Number the values of a set.

        Numbers are labels as they are. Names are numbered in sorted order, and where there is one all values are.
        """
        found = set(values)
        if all(isinstance(value, int) for value in found):
            count = 1 + max((int(value) for value in found), default=-1)
            return cls(tuple(map(str, range(count))), {label: label for label in range(count)})
        names = tuple(sorted(map(str, found)))
        labels = {name: label for label, name in enumerate(names)}
        return cls(names, {value: labels[str(value)] for value in found})


def only(found: Collection[T], place: str, noun: str, field: str) -> T:
    """The one element of a collection; UserError that lists all of them and names the field that says which."""
    if len(found) > 1:
        raise UserError(f"{place}: several {noun}, {_listed(found)}: name one of them with {field}")
    return next(iter(found))


def _listed(names: Iterable[object]) -> str:
    *first, last = map(str, names)
    return f"{', '.join(first)} and {last}" if first else last


def _json(record: Mapping[str, bytes], place: str) -> dict[str, object]:
    """Keys of the member `json` of a record; UserError where it is no object of JSON."""
    try:
        found = json.loads(record.get(_JSON, b"{}"))
    except ValueError as error:
        raise UserError(f"{place}: its member json holds no JSON ({error})") from error
    return found if isinstance(found, dict) else {}
