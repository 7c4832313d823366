"""The keys that a configuration model allows: error locations as dotted paths, and the nearest valid one."""

import difflib
import re
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

KeyPath = tuple[str | int, ...]

# A key of the same section is suggested before an equally similar one elsewhere, but not before an exact one.
_NEAR, _FOREIGN_PENALTY = 0.6, 0.2


class Spot(NamedTuple):
    """A place in a configuration: its path and the types that may own its last key."""

    path: KeyPath
    owners: list[Any]


def dotted(path: KeyPath) -> str:
    """Write a path with dots: ``("stages", 0, "images")`` becomes ``stages.0.images``."""
    return ".".join(map(str, path))


def find(model: type[BaseModel], location: KeyPath) -> Spot:
    """The place that pydantic's error location means: the labels of union members are taken out."""
    options: list[Any] = [model]
    spot, labeled = Spot((), options), False
    for part in location:
        if part == "[key]":
            break
        if len(options) > 1 and not labeled:
            options, labeled = [option for option in options if _has_label(option, str(part))] or options, True
            continue
        spot, labeled = Spot((*spot.path, part), options), False
        options = [child for option in options for child in _children(option, part)]
    return spot


def keys(owners: list[Any]) -> list[str]:
    """The keys that the given types allow."""
    return list(dict.fromkeys(name for owner in owners if _is_model(owner) for name in owner.model_fields))


def nearest(model: type[BaseModel], spot: Spot) -> KeyPath | None:
    """The valid path most like an unknown one: by its key among its siblings, then in the other sections."""
    *section, key = spot.path
    siblings = [(*section, name) for name in keys(spot.owners)]

    def score(path: KeyPath) -> float:
        return _similarity(str(key), str(path[-1])) - (0 if path in siblings else _FOREIGN_PENALTY)

    best = max(
        [*siblings, *_paths([model])], key=lambda path: (score(path), _similarity(dotted(spot.path), dotted(path)))
    )
    return best if score(best) >= _NEAR else None


def _similarity(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()


def _is_model(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, BaseModel)


def _is_mapping(option: Any) -> bool:
    return isinstance(origin := get_origin(option), type) and issubclass(origin, Mapping)


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union apart from None; any other type is its own only one."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [option for member in get_args(annotation) for option in _alternatives(member)]
    return [] if annotation is NoneType else [annotation]


def _children(option: Any, part: str | int) -> list[Any]:
    """The types that a model, mapping, list or tuple allows at one of its keys or indices."""
    if _is_model(option):
        field = option.model_fields.get(part)
        return _alternatives(field.annotation) if field else []
    arguments = get_args(option)
    if _is_mapping(option):
        return _alternatives(arguments[1])
    if not arguments or not isinstance(part, int):
        return []
    fixed = len(arguments) > 1 and arguments[1] is not Ellipsis
    return _alternatives(arguments[part if fixed else 0])


def _has_label(option: Any, label: str) -> bool:
    """Return whether pydantic's label of a union member, a type's name or a discriminator's value, means this type."""
    if not _is_model(option):
        return label.startswith(getattr(get_origin(option) or option, "__name__", ""))
    tags = [tag for field in option.model_fields.values() for tag in get_args(field.annotation)]
    return label in tags or re.search(rf"\b{re.escape(option.__name__)}\b", label) is not None


def _paths(options: list[Any], above: KeyPath = (), seen: frozenset[type] = frozenset()) -> Iterator[KeyPath]:
    """Yield every valid path below some types; of a list, those of its first entry."""
    for option in options:
        if _is_model(option) and option not in seen:
            for name in option.model_fields:
                yield (*above, name)
                yield from _paths(_children(option, name), (*above, name), seen | {option})
        elif not _is_mapping(option):
            yield from _paths(_children(option, 0), (*above, 0), seen)
