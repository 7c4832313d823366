"""The source of a module, and of all that it takes from other modules here, as one file that needs no other of ours."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class _Module:
    """The statements of a module by the names that they define."""

    name: str
    source: str
    docstring: str
    definitions: dict[str, str] = field(default_factory=dict)
    """Source of each function, class and constant, in the order of the file."""
    used: dict[str, list[str]] = field(default_factory=dict)
    """Names that each of them uses, annotations apart, in the order of their use."""
    ours: dict[str, str] = field(default_factory=dict)
    """Modules of this package by the names that are taken from them."""
    others: dict[str, str] = field(default_factory=dict)
    """Statements that import from elsewhere, by the name that each binds."""


def standalone_source(module: str) -> str:
    """Join the source of a module with the definitions that it uses of this package's modules, and only those.

    Annotations are not evaluated in the file, so what only they name is left out. A module that takes nothing stays as
    it is.

    Args:
        module: dotted name of a module, which is not imported.
    """
    root, taken = _read(module), dict[tuple[str, str], str]()
    if not root.ours:
        return root.source
    for name in root.definitions:
        _take(root, name, taken)
    names = [name for _, name in taken]
    assert len(names) == len(set(names)), "each name is defined once in the file"
    imports = {
        statement
        for place, name in taken
        for bound, statement in _read(place).others.items()
        if bound in _read(place).used[name]
    }
    header = f'"""{root.docstring}"""\n\nfrom __future__ import annotations\n\n' + "\n".join(sorted(imports))
    return "\n\n\n".join([header, *taken.values()]) + "\n"


def _take(module: _Module, name: str, taken: dict[tuple[str, str], str]) -> None:
    """Add a definition by its module and name, after all that it uses."""
    if (module.name, name) in taken:
        return
    taken[module.name, name] = ""  # one that uses itself is not looked at again
    for used in module.used[name]:
        if used in module.definitions:
            _take(module, used, taken)
        elif used in module.ours:
            _take(_read(module.ours[used]), used, taken)
    del taken[module.name, name]
    taken[module.name, name] = module.definitions[name]


@cache
def _read(name: str) -> _Module:
    spec = find_spec(name)
    assert spec is not None, "a module of this package"
    assert spec.origin is not None, "its file"
    source = Path(spec.origin).read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = source.splitlines()
    found = _Module(name, source, ast.get_docstring(tree, clean=False) or "")
    last = ""
    for node in tree.body[1:]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            _note_import(found, node)
            continue
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
        text = "\n".join(lines[first - 1 : node.end_lineno])
        if isinstance(node, ast.Expr):  # the docstring of the constant before it
            found.definitions[last] += f"\n{text}"
            continue
        last = _defined_name(node)
        found.definitions[last], found.used[last] = text, [*dict.fromkeys(_used_names(node))]
    return found


def _note_import(module: _Module, node: ast.Import | ast.ImportFrom) -> None:
    for alias in node.names:
        if isinstance(node, ast.Import):
            statement = f"import {alias.name}"
        else:
            assert node.module is not None, "imports are absolute"
            if node.module.partition(".")[0] == _PACKAGE:
                assert alias.asname is None, "the same name in both modules"
                module.ours[alias.name] = node.module
                continue
            statement = f"from {node.module} import {alias.name}"
        bound = alias.asname or alias.name.partition(".")[0]
        module.others[bound] = statement + (f" as {alias.asname}" if alias.asname else "")


def _defined_name(node: ast.stmt) -> str:
    if isinstance(node, ast.Assign):
        node = node.targets[0]  # type: ignore[assignment]
    elif isinstance(node, ast.AnnAssign):
        node = node.target  # type: ignore[assignment]
    name = getattr(node, "name", None) or getattr(node, "id", None)
    assert isinstance(name, str), "functions, classes and constants"
    return name


def _used_names(node: ast.AST) -> Iterator[str]:
    """Names in a statement outside annotations."""
    if isinstance(node, ast.Name):
        yield node.id
    for key, value in ast.iter_fields(node):
        if key not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _used_names(child)
