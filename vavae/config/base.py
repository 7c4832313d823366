"""The base class of all configuration models, and what of a configuration enters its digest."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic.fields import FieldInfo
from typing_extensions import Self

from vavae.config.credentials import REFUSAL, has_credentials
from vavae.config.paths import written_path

_RUNTIME, _NEUTRAL = "runtime", "neutral"
_STORED = {"stored": True}
"""Validation context of stored values: fields that are missing were not there yet."""


class Config(BaseModel):
    """A frozen, strict section of the configuration; an unknown key is an error.

    A field is *identity* (it changes results) unless it is declared with :func:`runtime`; one that came after the first
    release is declared with :func:`added`. None holds credentials.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _no_credentials(cls, values: Any) -> Any:
        # Not a validator of the fields: the message about one shows its value.
        for name, value in values.items() if isinstance(values, Mapping) else ():
            texts = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(text, str) and has_credentials(text) for text in texts):
                raise ValueError(f"{name} is {REFUSAL}")
        return values

    @classmethod
    def restore(cls, stored: Any) -> Self:
        """The configuration that was stored with :func:`identity`: fields that it lacks had their neutral values."""
        return cls.model_validate(stored, context=_STORED)

    @model_validator(mode="before")
    @classmethod
    def _neutral_where_stored_without(cls, values: Any, info: ValidationInfo) -> Any:
        return {**_neutral(cls), **values} if info.context is _STORED and isinstance(values, Mapping) else values


def runtime(default: Any = ..., **field: Any) -> Any:
    """Declare a field that says how a run is carried out (workers, paths, intervals, budgets), not what it computes."""
    return Field(default, json_schema_extra={_RUNTIME: True}, **field)


def added(default: Any, *, neutral: Any = ..., **field: Any) -> Any:
    """Declare an identity field that runs on storage were made without.

    At its neutral value it is left out of identities and digests, so that those runs stay what they are.

    Args:
        default: the value where a file does not give one.
        neutral: the value at which everything is as it was before there was this field; the default, if not given.
        field: further arguments of pydantic's `Field`.
    """
    return Field(default, json_schema_extra={_NEUTRAL: default if neutral is ... else neutral}, **field)


def identity(value: Any, *, with_runtime: bool = False) -> Any:
    """The part of a configuration that determines results, as plain JSON values.

    Args:
        value: a configuration, or a structure of configurations and plain values.
        with_runtime: keep what is declared with :func:`runtime`, too.
    """
    if isinstance(value, BaseModel):
        fields, neutral = type(value).model_fields, _neutral(type(value))
        plain = {
            name: identity(getattr(value, name), with_runtime=with_runtime)
            for name, field in fields.items()
            if with_runtime or not _is_runtime(field)
        }
        without = {name: identity(item, with_runtime=with_runtime) for name, item in neutral.items()}
        return {name: item for name, item in plain.items() if name not in without or item != without[name]}
    if isinstance(value, Mapping):
        return {str(key): identity(item, with_runtime=with_runtime) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [identity(item, with_runtime=with_runtime) for item in value]
    if isinstance(value, str):
        return written_path(value)
    assert value is None or isinstance(value, (int, float, bool)), f"no JSON form for {type(value)}"
    return value


def digest(value: Any) -> str:
    """SHA-256 in hexadecimal of the identity of a configuration, or of any structure of plain values."""
    text = json.dumps(identity(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(before: Any, after: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted paths at which the identities of two configurations differ, with both values; a missing value is None.

    Either may be an identity that was stored: what it lacks of the other's :func:`added` fields was neutral.
    """
    entries, others = _entries(before, after), _entries(after, before)
    if entries is not None and others is not None:
        found = []
        for key in sorted({*entries, *others}):
            found += differences(entries.get(key), others.get(key), f"{path}.{key}" if path else str(key))
        return found
    before, after = identity(before), identity(after)
    return [] if before == after else [(path, before, after)]


def _entries(section: Any, other: Any) -> Mapping[str, Any] | None:
    """Fields of a section to compare, neutral values included; None for any other value."""
    if isinstance(section, BaseModel):
        fields = type(section).model_fields
        return {name: getattr(section, name) for name, field in fields.items() if not _is_runtime(field)}
    if not isinstance(section, Mapping):
        return None
    return {**_neutral(type(other)), **section} if isinstance(other, BaseModel) else section


def _is_runtime(field: FieldInfo) -> bool:
    return _RUNTIME in _extra(field)


def _neutral(model: type[BaseModel]) -> dict[str, Any]:
    """Neutral values, by name, of the fields that came after the first release."""
    extras = {name: _extra(field) for name, field in model.model_fields.items()}
    return {name: extra[_NEUTRAL] for name, extra in extras.items() if _NEUTRAL in extra}


def _extra(field: FieldInfo) -> Mapping[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, Mapping) else {}
