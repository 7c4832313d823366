"""The space of a sweep: its points, how they are enumerated, drawn and chosen, and what each one sets."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from numpy.random import Generator

from vavae.errors import UserError
from vavae.sweep.config import DomainConfig, conditions

Point = dict[str, str | float]
"""The keys that are set, each with the name of an option or with a number; keys whose condition fails are missing."""

Choose = Callable[[str, DomainConfig], str | float]
"""Picks a value, as in a point, from the domain of a key."""


class Space:
    """The domains of a sweep by dotted key; a condition refers to keys before its own."""

    def __init__(self, domains: Mapping[str, DomainConfig]) -> None:
        self.domains = dict(domains)

    def walk(self, choose: Choose) -> Point:
        """The point that comes out when every key whose condition holds is chosen in turn."""
        point: Point = {}
        for path, domain in self.domains.items():
            if _holds(domain, point):
                point[path] = choose(path, domain)
        return point

    def known_point(self, point: Point) -> Point | None:
        """A point that was stored, in the order of this space; None where it is not one of its points."""
        if not all(path in self.domains and _has(self.domains[path], value) for path, value in point.items()):
            return None
        ordered = self.walk(lambda path, domain: point.get(path, math.nan))
        return ordered if ordered == point else None

    def points(self) -> list[Point]:
        """Every combination of the options, in the order in which they are written; for spaces without ranges."""
        return list(self._expand({}, list(self.domains), lambda domain: True))

    def draw(self, generator: Generator, count: int) -> list[Point]:
        """Points drawn independently: so many for each combination of the `grid` domains, equal ones kept once."""
        drawn = {}
        for cell in self._expand({}, list(self.domains), lambda domain: domain.grid is not None):
            for _ in range(count):
                point = self.walk(_fixed_or(cell, lambda domain: _drawn(domain, generator)))
                drawn[tuple(point.items())] = point
        return list(drawn.values())

    def examples(self) -> list[Point]:
        """Points in which, together, every option occurs, and of every range both ends and a number between them.

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
        """What a point sets: values of the configuration by dotted key, in the order in which they are set."""
        return {path: self.domains[path].options.get(str(value), value) for path, value in point.items()}

    def _required(self, path: str) -> Point:
        """Values of the other keys under which a key is set, the first that fit."""
        required: Point = {}
        for other, wanted in self.domains[path].when.items():
            required |= self._required(other) | {other: conditions(wanted)[0]}
        return required

    def _expand(self, point: Point, rest: list[str], crossed: Callable[[DomainConfig], bool]) -> Iterator[Point]:
        """All points that continue one with the keys that are left, of the domains that are crossed."""
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
    """Choose what is fixed, and everything else in another way."""
    return lambda path, domain: fixed[path] if path in fixed else otherwise(domain)


def _holds(domain: DomainConfig, point: Point) -> bool:
    return all(point.get(path) in conditions(wanted) for path, wanted in domain.when.items())


def _has(domain: DomainConfig, value: str | float) -> bool:
    if domain.range is None:
        return value in domain.options
    return isinstance(value, float) and domain.range[0] <= value <= domain.range[1]


def _drawn(domain: DomainConfig, generator: Generator) -> str | float:
    if domain.range is None:
        names = list(domain.options)
        return names[generator.integers(len(names))]
    low, high = domain.range
    if domain.loguniform is None:
        return float(generator.uniform(low, high))
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def _extremes(domain: DomainConfig) -> list[str | float]:
    """Every option; of a range both ends, and a number between them that is no whole one by accident."""
    if domain.range is None:
        return list(domain.options)
    low, high = domain.range
    return [low, high, low + (high - low) / math.e]
