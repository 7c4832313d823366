"""YAML as a tree that remembers where each value was written: parsing, merging and writing."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

_FLOAT = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$
    |[-+]?\.(?:inf|Inf|INF)$
    |\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Located:
    """A value and where it was written: ``file:line`` of its key, or ``command line``.

    ``value`` is ``dict[str, Located]``, ``list[Located]`` or a scalar.
    """

    value: Any
    place: str


class _Loader(yaml.SafeLoader):
    """Safe loader by the plain scalars of YAML 1.2: ``1e-4`` is a number, ``no`` and ``2024-01-01`` are words."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML's own table

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _problem(f"a tag ({event.tag}) cannot be used here", event.start_mark)
        return super().compose_node(parent, index)

    def tree(self, node: yaml.Node, mark: yaml.Mark, at: Callable[[int], str], above: tuple[yaml.Node, ...]) -> Located:
        """The node's value with the place of ``mark``, which is its key where it has one."""
        if node in above:
            raise _problem("an alias contains itself", node.start_mark)
        above = (*above, node)
        value: Any
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            value = {key.value: self.tree(item, key.start_mark, at, above) for key, item in node.value}
        elif isinstance(node, yaml.SequenceNode):
            value = [self.tree(item, item.start_mark, at, above) for item in node.value]
        else:
            value = self.construct_object(node)
        return Located(value, at(mark.line + 1))


for _kind, _pattern, _first in (
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, _first)


class _Dumper(yaml.SafeDumper):
    """Dumper with blocks for mappings, one line for lists of scalars, no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, not any(isinstance(item, (dict, list)) for item in sequence))

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Line breaks beyond ASCII survive only where they are escaped, which double quotes do.
        return self.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _problem(text: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _problem("a key must be a single word", key.start_mark)
        if key.value in lines:
            raise _problem(f"{key.value} is given twice, first in line {lines[key.value]}", key.start_mark)
        lines[key.value] = key.start_mark.line + 1


def parse(text: str, at: Callable[[int], str]) -> Located:
    """Parse one YAML document; ``at`` names the place of a line, counted from 1. Raises ``yaml.YAMLError``."""
    loader = _Loader(text)
    node = loader.get_single_node()
    return Located(None, at(1)) if node is None else loader.tree(node, node.start_mark, at, ())


def explain_syntax(error: yaml.YAMLError) -> str:
    """Describe a syntax error in one line, without its place."""
    if isinstance(error, yaml.MarkedYAMLError):
        return ", ".join(part for part in (error.context, error.problem) if part)
    return " ".join(str(error).split())


def line_of(error: yaml.YAMLError) -> int | None:
    """Line, counted from 1, that an error points at; None where it points at none."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return mark.line + 1 if mark else None


def merge(base: Located, over: Located) -> Located:
    """Lay ``over`` on ``base``: mappings merge key by key, everything else is replaced."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, item in over.value.items():
        merged[key] = merge(merged[key], item) if key in merged else item
    return Located(merged, over.place)


def plain(tree: Located) -> Any:
    """The values of a tree without their places."""
    if isinstance(tree.value, dict):
        return {key: plain(item) for key, item in tree.value.items()}
    return [plain(item) for item in tree.value] if isinstance(tree.value, list) else tree.value


def place_of(tree: Located, path: Sequence[str | int]) -> str:
    """Place where the value at a path was written, or the nearest section above it."""
    for part in path:
        entries = dict(enumerate(tree.value)) if isinstance(tree.value, list) else tree.value
        if not isinstance(entries, dict) or part not in entries:
            break
        tree = entries[part]
    return tree.place


def to_text(values: Any) -> str:
    """YAML of plain values in the order of their keys; :func:`parse` reads the same values back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)
