"""Loading of configurations: YAML files with inheritance and overrides, checked against a model, and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from vavae.config.base import Config
from vavae.config.explain import explain, show
from vavae.config.presets import find_config
from vavae.config.yaml_source import Located, explain_syntax, line_of, merge, parse, plain, to_text
from vavae.errors import UserError

_INHERIT = "defaults"
_COMMAND_LINE = "command line"

ConfigT = TypeVar("ConfigT", bound=Config)


def load(model: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read and check a configuration, given by its path, or by its name where it comes with the package.

    ``defaults:`` at the top of a file names one file or a list of files, relative to it, over which it is laid:
    mappings merge, lists and scalars replace. Overrides are ``key.path=value`` with a YAML value, and the later one
    wins. A mapping merges into what is there (``section=null section={...}`` replaces it), ``stages.0.images=…``
    changes one entry of a list that a file gives, and ``key=`` sets null.

    Raises:
        UserError: one line with the dotted path, where it was written and what is wrong with it.
    """
    return check(model, read(path, overrides))


def read(path: str | Path, overrides: Sequence[str] = ()) -> Located:
    """The tree of a file, of those that it inherits and of overrides, as for :func:`load`, before it is checked."""
    tree = _read(find_config(path))
    for override in overrides:
        tree = _apply(tree, override)
    return tree


def check(model: type[ConfigT], tree: Located) -> ConfigT:
    """The configuration that a tree holds; UserError as for :func:`load`."""
    assert _INHERIT not in model.model_fields, f"{_INHERIT} is the key of inheritance, {model.__name__} cannot have it"
    try:
        return model.model_validate(plain(tree))
    except ValidationError as error:
        raise UserError(explain(error, model, tree)) from None


def assign(tree: Located, path: str, item: Located) -> Located:
    """A tree with an item merged in at a dotted path, as by an override; UserError where there is no such place."""
    return _assign(tree, path.split("."), item, 0)


def override(config: ConfigT, overrides: Sequence[str]) -> ConfigT:
    """A configuration with overrides laid over it, as for :func:`load`; UserError where it is not valid then."""
    tree = parse(dump(config), lambda _: "configuration")
    for each in overrides:
        tree = _apply(tree, each)
    return check(type(config), tree)


def dump(config: Config) -> str:
    """The resolved configuration as YAML: every field in the model's order; :func:`load` gives the same digest."""
    return to_text(config.model_dump(mode="json"))


def _read(path: Path, prefix: str = "", above: tuple[Path, ...] = ()) -> Located:
    """Read one file laid over those that it inherits; ``above`` are the files that led here."""
    chain = (*above, path)
    if path.resolve() in [file.resolve() for file in above]:
        raise UserError(f"{prefix}a cycle: {' -> '.join(map(str, chain))}")
    tree = _parse_file(path, prefix)
    if tree.value is not None and not isinstance(tree.value, dict):
        raise UserError(f"{tree.place}: a configuration is a mapping of keys, not {show(plain(tree))}")
    entries = dict(tree.value or {})
    inherit = entries.pop(_INHERIT, Located([], str(path)))
    base = Located({}, str(path))
    for name in _names(inherit):
        base = merge(base, _read(path.parent / name, f"{inherit.place}: {_INHERIT}: ", chain))
    return merge(base, Located(entries, str(path)))


def _names(inherit: Located) -> list[str]:
    value = plain(inherit)
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{inherit.place}: {_INHERIT} is a path or a list of paths, not {show(value)}")
    return names


def _parse_file(path: Path, prefix: str) -> Located:
    try:
        return parse(path.read_text(encoding="utf-8"), lambda line: f"{path}:{line}")
    except OSError as error:
        raise UserError(f"{prefix}{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{prefix}{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        line = line_of(error)
        raise UserError(
            f"{path}:{line}: {explain_syntax(error)}" if line else f"{path}: {explain_syntax(error)}"
        ) from None


def _apply(tree: Located, override: str) -> Located:
    """A tree with one ``key.path=value`` of the command line merged in."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"{override} ({_COMMAND_LINE}): an override has the form key.path=value")
    try:
        item = parse(text, lambda _: _COMMAND_LINE)
    except yaml.YAMLError as error:
        raise UserError(f"{override} ({_COMMAND_LINE}): the value is not YAML: {explain_syntax(error)}") from None
    return _assign(tree, parts, item, 0)


def _assign(tree: Located, parts: list[str], item: Located, depth: int) -> Located:
    """A tree with an item merged in at a path; ``depth`` parts of the path are walked already."""
    if depth == len(parts):
        return merge(tree, item)
    part, here, path = parts[depth], ".".join(parts[:depth]), ".".join(parts)
    if isinstance(tree.value, list):
        if not part.isdecimal() or int(part) >= len(tree.value):
            held = f"{here} has {len(tree.value)} entries ({tree.place}), counted from 0"
            raise UserError(f"{path} ({item.place}): no such entry; {held}")
        entries = list(tree.value)
        entries[int(part)] = _assign(entries[int(part)], parts, item, depth + 1)
        return Located(entries, tree.place)
    if tree.value is not None and not isinstance(tree.value, dict):
        raise UserError(f"{path} ({item.place}): {here} is {show(tree.value)} ({tree.place}), not a section of keys")
    section = dict(tree.value or {})
    section[part] = _assign(section.get(part, Located({}, item.place)), parts, item, depth + 1)
    return Located(section, tree.place)
