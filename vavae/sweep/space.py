"""The space of a sweep: its points are enumerated, drawn or chosen, and set keys of the configuration."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from numpy.random import Generator

from vavae.errors import UserError
from vavae.sweep.config import DomainConfig, conditions

Point = dict[str, str | float]
"""Keys and their values: the name of an option, or a number. Keys whose condition fails are left out."""

Choose = Callable[[str, DomainConfig], str | float]
"""Chooses the value of a key from its domain."""


class Space:
    """The domains of a sweep by dotted key.

    Args:
        domains: by key; a condition refers to keys before its own.
    """

    def __init__(self, domains: Mapping[str, DomainConfig]) -> None:
        self.domains = dict(domains)

    def walk(self, choose: Choose) -> Point:
        """Build a point by choosing, in turn, every key whose condition holds."""
        point: Point = {}
        for path, domain in self.domains.items():
            if _holds(domain, point):
                point[path] = choose(path, domain)
        return point

    def known_point(self, point: Point) -> Point | None:
        """A stored point with its keys in the order of this space; None where it is not a point of it."""
        if not all(path in self.domains and _contains(self.domains[path], value) for path, value in point.items()):
            return None
        ordered = self.walk(lambda path, domain: point.get(path, math.nan))
        return ordered if ordered == point else None

    def points(self) -> list[Point]:
        """Enumerate every combination of the options, in the order written; for spaces without ranges."""
        return list(self._expand({}, list(self.domains), lambda domain: True))

    def draw(self, rng: Generator, count: int) -> list[Point]:
        """Draw points independently; equal ones are kept once.

        Args:
            rng: source of randomness.
            count: points for each combination of the `grid` domains.
        """
        drawn = {}
        for cell in self._expand({}, list(self.domains), lambda domain: domain.grid is not None):
            for _ in range(count):
                point = self.walk(_fixed_or(cell, lambda domain: _draw(domain, rng)))
                drawn[tuple(point.items())] = point
        return list(drawn.values())

    def examples(self) -> list[Point]:
        """Points that cover every option, and of every range both ends and a number between them.

        Raises:
            UserError: a key is never set, because its conditions contradict each other.
        """
        examples = []
        for path, domain in self.domains.items():
            for value in _extremes(domain):
                point = self.walk(_fixed_or(self._required(path) | {path: value}, lambda other: _extremes(other)[0]))
                if path not in point:
                    raise UserError(f"sweep.{path}: its conditions never hold together: correct when")
                examples.append(point)
        return examples

    def values(self, point: Point) -> dict[str, Any]:
        """Values of the configuration that a point sets, by dotted key, in the order in which they are set."""
        return {path: self.domains[path].options.get(str(value), value) for path, value in point.items()}

    def _required(self, path: str) -> Point:
        """The first values of other keys with which the condition of a key holds."""
        required: Point = {}
        for other, wanted in self.domains[path].when.items():
            required |= self._required(other) | {other: conditions(wanted)[0]}
        return required

    def _expand(self, point: Point, rest: list[str], crossed: Callable[[DomainConfig], bool]) -> Iterator[Point]:
        """Extend a point by every combination of the remaining keys.

        Args:
            point: values of the keys before.
            rest: the remaining keys.
            crossed: tells for a domain whether its options are combined; keys of other domains are left out.
        """
        if not rest:
            yield point
            return
        path, domain = rest[0], self.domains[rest[0]]
        if not crossed(domain) or not _holds(domain, point):
            yield from self._expand(point, rest[1:], crossed)
            return
        for name in domain.options:
            yield from self._expand({**point, path: name}, rest[1:], crossed)


def _fixed_or(fixed: Point, otherwise: Callable[[DomainConfig], str | float]) -> Choose:
    """Choose the fixed values, and all others by `otherwise`."""
    return lambda path, domain: fixed[path] if path in fixed else otherwise(domain)


def _holds(domain: DomainConfig, point: Point) -> bool:
    return all(point.get(path) in conditions(wanted) for path, wanted in domain.when.items())


def _contains(domain: DomainConfig, value: str | float) -> bool:
    if domain.range is None:
        return value in domain.options
    return isinstance(value, float) and domain.range[0] <= value <= domain.range[1]


def _draw(domain: DomainConfig, rng: Generator) -> str | float:
    if domain.range is None:
        names = list(domain.options)
        return names[rng.integers(len(names))]
    low, high = domain.range
    if domain.loguniform is None:
        return float(rng.uniform(low, high))
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _extremes(domain: DomainConfig) -> list[str | float]:
    """Every option; of a range both ends, and a number between them that is not a whole one by accident."""
    if domain.range is None:
        return list(domain.options)
    low, high = domain.range
    return [low, high, low + (high - low) / math.e]
