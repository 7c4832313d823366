"""The base class of all configuration models, and what of a configuration enters its digest."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vavae.config.credentials import REFUSAL, has_credentials

_RUNTIME = {"runtime": True}


class Config(BaseModel):
    """A frozen, strict section of the configuration; an unknown key is an error.

    A field is *identity* (it changes results) unless it is declared with :func:`runtime`. None holds credentials.
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


def runtime(default: Any = ..., **field: Any) -> Any:
    """Declare a field that says how a run is carried out (workers, paths, intervals, budgets), not what it computes."""
    return Field(default, json_schema_extra=dict(_RUNTIME), **field)


def identity(value: Any) -> Any:
    """The part of a configuration that determines results, as plain JSON values."""
    if isinstance(value, BaseModel):
        return {
            name: identity(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if field.json_schema_extra != _RUNTIME
        }
    if isinstance(value, Mapping):
        return {str(key): identity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [identity(item) for item in value]
    assert value is None or isinstance(value, (str, int, float, bool)), f"no JSON form for {type(value)}"
    return value


def digest(value: Any) -> str:
    """SHA-256 in hexadecimal of the identity of a configuration, or of any structure of plain values."""
    text = json.dumps(identity(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(before: Any, after: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted paths at which two identities differ, with both values; a missing value is None."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        found = []
        for key in sorted({*before, *after}):
            found += differences(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if before == after else [(path, before, after)]
