"""Local paths of a configuration: which fields may hold one, and what a relative one is relative to."""

import operator
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, Field, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

ModelT = TypeVar("ModelT", bound=BaseModel)

HUB_PREFIX = "hf-hub:"
"""Prefix that tells a repository of the Hugging Face hub from a path, which may look the same; timm's own."""
_HUB_ADDRESS = re.compile(
    HUB_PREFIX + r"(?P<repository>[\w.-]+/[\w.-]+)(/(?P<path>[\w./-]*[\w.-]))?(@(?P<revision>[\w./-]+))?"
)


_OWN_PATH = re.compile(r"(?P<before>indexed:)?(file://)?[/~][^#]*?(?P<name>[^/#]*)/?(?P<inside>#.*)?")
ELSEWHERE = "path/to/"
"""Stands for a folder that another machine does not have."""


class HubAddress(NamedTuple):
    """A place on the Hugging Face hub: `hf-hub:owner/name[/path][@revision]`."""

    repository: str
    path: str
    """Folder or file in the repository; empty for all of it."""
    revision: str | None
    """Branch, tag or commit; None for the main branch."""

    @classmethod
    def parse(cls, text: str) -> "HubAddress":
        """Take an address apart; ValueError where it has another form."""
        parts = _HUB_ADDRESS.fullmatch(text)
        if parts is None or {".", "..", ""} & {*(parts["path"] or "-").split("/"), *parts["repository"].split("/")}:
            raise ValueError(f"{text}: write {HUB_PREFIX}owner/name, or {HUB_PREFIX}owner/name/folder@revision")
        return cls(parts["repository"], parts["path"] or "", parts["revision"])

    def __str__(self) -> str:
        path, revision = f"/{self.path}" if self.path else "", f"@{self.revision}" if self.revision else ""
        return f"{HUB_PREFIX}{self.repository}{path}{revision}"


def is_hub_address(text: str) -> bool:
    """Return whether a text means a place on the Hugging Face hub."""
    return text.startswith(HUB_PREFIX)


def _check_hub_address(text: str) -> str:
    if is_hub_address(text):
        HubAddress.parse(text)
    return text


class ResolvedPath(str):
    """An absolute path that was written as a relative one.

    It opens the same file in every process, whatever its working directory. Digests and stored configurations have it
    as it was written, so they do not depend on where a command was typed.

    Args:
        path: the absolute path.
        written: as the configuration has it.
    """

    written: str

    def __new__(cls, path: str, written: str) -> "ResolvedPath":
        """Create the string, which cannot be changed afterwards."""
        resolved = super().__new__(cls, path)
        resolved.written = written
        return resolved

    def __reduce__(self) -> tuple[type["ResolvedPath"], tuple[str, str]]:
        return ResolvedPath, (str(self), self.written)


@dataclass(frozen=True)
class LocalPath:
    """Mark of a field that may hold the path of a local file or folder: ``Annotated[str, LocalPath()]``.

    URLs, absolute paths and those that begin with ``~`` are the same from everywhere.
    """

    words: tuple[str, ...] = ()
    """Values that are no path."""
    names: tuple[str, ...] = ()
    """Beginnings of values that are no path, such as ``hf-hub:``."""
    before: tuple[str, ...] = ()
    """Prefixes that may stand before a path, such as ``indexed:``."""

    def resolve(self, text: str, folder: str) -> str:
        """A value with its relative path, if it holds one, made absolute."""
        if isinstance(text, ResolvedPath) or text in self.words or text.startswith(self.names):
            return text
        prefix = next((prefix for prefix in self.before if text.startswith(prefix)), "")
        path = text.removeprefix(prefix)
        if not path or path.startswith("~") or "://" in path or os.path.isabs(path):
            return text
        return ResolvedPath(prefix + os.path.abspath(os.path.join(folder, path)), text)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # A section made of another one's values keeps what pydantic would make a plain string of.
        return core_schema.no_info_wrap_validator_function(
            lambda value, check: value if isinstance(value, ResolvedPath) else check(value),
            handler(source),
            serialization=core_schema.plain_serializer_function_ser_schema(
                written_path, return_schema=core_schema.str_schema(), when_used="json"
            ),
        )


ModelAddress = Annotated[str, Field(min_length=1), LocalPath(names=(HUB_PREFIX,)), AfterValidator(_check_hub_address)]
"""Address of a model: a path, a storage URL, or a place on the hub."""


def written_path(text: str) -> str:
    """The form in which a value of a configuration was written."""
    return text.written if isinstance(text, ResolvedPath) else text


def without_own_folders(value: Any) -> Any:
    """A configuration, or a structure of plain values, that names no folder of the machine that it was used on.

    Absolute local paths, and those below a home, become `path/to/NAME`; others stay as they were written.
    """
    if isinstance(value, BaseModel):
        return value.model_copy(update={name: without_own_folders(item) for name, item in value})
    if isinstance(value, Mapping):
        return {key: without_own_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_own_folders(item) for item in value)
    if not isinstance(value, str):
        return value
    own = _OWN_PATH.fullmatch(written_path(value))
    return value if own is None else f"{own['before'] or ''}{ELSEWHERE}{own['name']}{own['inside'] or ''}"


def resolve_paths(config: ModelT, folder: str | None = None) -> ModelT:
    """A configuration whose relative paths open the same files from everywhere; its digests and its dump stay.

    Args:
        config: at any depth of sections. One that is resolved already comes back as it is.
        folder: what relative paths are relative to; the working directory by default.
    """
    return _resolve(config, os.getcwd() if folder is None else folder)


def _resolve(value: Any, folder: str) -> Any:
    if isinstance(value, tuple):
        items = tuple(_resolve(item, folder) for item in value)
        return value if all(map(operator.is_, items, value)) else items
    if not isinstance(value, BaseModel):
        return value
    changed = {}
    for name, field in type(value).model_fields.items():
        before, mark = getattr(value, name), _mark(field)
        after = mark.resolve(before, folder) if mark and isinstance(before, str) else _resolve(before, folder)
        if after is not before:
            changed[name] = after
    return value.model_copy(update=changed) if changed else value


def _mark(field: FieldInfo) -> LocalPath | None:
    """The `LocalPath` of a field, or of a member of its union; None where there is none."""
    of_members = [mark for member in get_args(field.annotation) for mark in getattr(member, "__metadata__", ())]
    return next((mark for mark in [*field.metadata, *of_members] if isinstance(mark, LocalPath)), None)
