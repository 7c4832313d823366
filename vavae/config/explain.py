"""Failed validations in one line: the dotted path, where it was written, the value given and what was expected."""

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from vavae.config.schema import KeyPath, Spot, dotted, find, keys, nearest
from vavae.config.yaml_source import Located, place_of

_SHOWN_KEYS, _SHOWN_CHARACTERS = 12, 60
_EXPECTED = {
    "model_type": "should be a section of keys",
    "dict_type": "should be a section of keys",
    "list_type": "should be a list, given as a whole",
    "tuple_type": "should be a list, given as a whole",
    "string_type": "should be text",
}


def show(value: Any) -> str:
    """A value as a user would write it, on one line and cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def explain(error: ValidationError, model: type[BaseModel], tree: Located) -> str:
    """The first problem in one line and the number of the others. An unknown key comes first: it explains the rest."""
    problems: dict[KeyPath, list[Any]] = {}
    for detail in sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden"):
        problems.setdefault(_path(model, detail), []).append(detail)
    path, details = next(iter(problems.items()))
    place = place_of(tree, path)
    subject = f"{dotted(path)} ({place})" if path else place
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{subject}: {_describe(model, details)}{others}"


def _path(model: type[BaseModel], detail: Mapping[str, Any]) -> KeyPath:
    path = find(model, detail["loc"]).path
    tagged = detail["type"] in ("union_tag_invalid", "union_tag_not_found")
    return (*path, detail["ctx"]["discriminator"].strip("'")) if tagged else path


def _describe(model: type[BaseModel], details: list[Any]) -> str:
    """Describe the error at one path; the members of a union each have their own expectation."""
    first = details[0]
    if first["type"] == "extra_forbidden":
        return _unknown(model, find(model, first["loc"]))
    if first["type"] in ("missing", "union_tag_not_found"):
        return "this key is required and not given"
    if first["type"] in ("value_error", "assertion_error"):
        return _validator_message(str(first["ctx"]["error"]), first["input"])
    if first["type"] == "union_tag_invalid":
        return f"{show(first['ctx']['tag'])} should be one of {first['ctx']['expected_tags']}"
    remedy = "; put it in quotes" if first["type"] == "string_type" and isinstance(first["input"], (int, float)) else ""
    return f"{show(first['input'])} {' or '.join(dict.fromkeys(map(_expected, details)))}{remedy}"


def _unknown(model: type[BaseModel], spot: Spot) -> str:
    near = nearest(model, spot)
    if near is not None:
        return f"no such key; did you mean {dotted(near)}?"
    valid = keys(spot.owners)
    more = ", …" if len(valid) > _SHOWN_KEYS else ""
    return f"no such key; valid here: {', '.join(valid[:_SHOWN_KEYS])}{more}"


def _expected(detail: Mapping[str, Any]) -> str:
    """Expectation from Pydantic's ``Input should be …``, without its subject."""
    message = " ".join(detail["msg"].split())
    return _EXPECTED.get(detail["type"]) or re.sub(r"^\w+ (?=should )", "", message)


def _validator_message(message: str, given: Any) -> str:
    """Message of one of our validators, with the value where it does not say it itself."""
    message = " ".join(message.split())
    if isinstance(given, (Mapping, list, tuple, BaseModel)) or str(given) in message:
        return message
    return f"{message}, not {show(given)}"
