"""Sides that do equal work take turns; the table of what came out."""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import NamedTuple

from vavae.hardware import processor_name

OURS = "vavae"
_COLUMNS = {"contest": 24, "unit": 20, "against": 18, "theirs": 9, OURS: 9, "ratio": 7, "range": 16}
"""Names and widths."""


class Contest(NamedTuple):
    """Sides that do the same work."""

    name: str
    unit: str
    sides: Mapping[str, Callable[[], float]]
    """What one turn of each gives, in the unit; ours is called `vavae`."""
    less_is_better: bool = False


class Row(NamedTuple):
    """A line of the table: ours against one other, medians over the rounds."""

    contest: str
    unit: str
    rival: str
    theirs: float | None
    ours: float
    ratios: tuple[float, ...]
    """How many times better ours was in each round."""


class LeftOut(NamedTuple):
    """A contest that cannot be held here."""

    contest: str
    reason: str


def compete(contest: Contest, rounds: int) -> list[Row]:
    """Let every side have its turn, `rounds` times over after a first one that does not count."""
    for warm_up in contest.sides.values():
        warm_up()
    figures: dict[str, list[float]] = {side: [] for side in contest.sides}
    for _ in range(rounds):
        for side, turn in contest.sides.items():
            figures[side].append(turn())
    ours = figures.pop(OURS)
    return [
        Row(contest.name, contest.unit, rival, statistics.median(theirs), statistics.median(ours), ratios)
        for rival, theirs in figures.items()
        for ratios in [tuple(_times_better(contest, *pair) for pair in zip(ours, theirs, strict=True))]
    ]


def _times_better(contest: Contest, ours: float, theirs: float) -> float:
    return theirs / ours if contest.less_is_better else ours / theirs


def processor_rate(work: Callable[[], int]) -> Callable[[], float]:
    """Turns of a side whose work returns how many samples it went through: samples per second of processor time."""
    return lambda: _rate(work, time.process_time)


def wall_rate(work: Callable[[], int]) -> Callable[[], float]:
    """The same per second of the clock on the wall."""
    return lambda: _rate(work, time.perf_counter)


def _rate(work: Callable[[], int], clock: Callable[[], float]) -> float:
    gc.disable()  # as timeit does: a collection walks through all that was ever imported, whosever turn it is
    try:
        start = clock()
        count = work()
        return count / (clock() - start)
    finally:
        gc.enable()


def machine(*packages: str) -> str:
    """Processor, cores, and versions of torch and of those packages that are installed, in one line."""
    versions = ", ".join(f"{name} {version}" for name in ("torch", *packages) if (version := installed(name)))
    return f"{processor_name()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def installed(distribution: str) -> str | None:
    """Version of a package; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def table_head() -> str:
    """The first two lines of the table, which is Markdown."""
    rule = "|".join("-" * (width + 2) for width in _COLUMNS.values())
    return f"{_line(*_COLUMNS)}\n|{rule}|"


def table_line(row: Row) -> str:
    """The line of one row."""
    theirs = "" if row.theirs is None else _figure(row.theirs)
    ratio = f"{statistics.median(row.ratios):.2f}x" if row.ratios else ""
    spread = f"{min(row.ratios):.2f} to {max(row.ratios):.2f}" if row.ratios else ""
    return _line(row.contest, row.unit, row.rival, theirs, _figure(row.ours), ratio, spread)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, _COLUMNS.values(), strict=True)) + " |"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
