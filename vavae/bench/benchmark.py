"""Benchmarks whose sides do equal work and take turns, and the table of their results."""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import NamedTuple, TypeVar

from vavae.hardware import processor_name

VAVAE_SIDE = "vavae"
_COLUMNS = {"benchmark": 24, "unit": 20, "against": 18, "baseline": 9, VAVAE_SIDE: 9, "ratio": 7, "range": 16}
"""Names and widths of the columns."""

T = TypeVar("T")


class Benchmark(NamedTuple):
    """Sides that do equal work."""

    name: str
    unit: str
    sides: Mapping[str, Callable[[], float]]
    """One turn of each side by name, which returns its value in the unit; `vavae` is one of them."""
    less_is_better: bool = False


class Measurement(NamedTuple):
    """Values of the sides of a benchmark in one unit."""

    benchmark: str
    unit: str
    values: Mapping[str, tuple[float, ...]]
    """Values by side, one a round."""
    less_is_better: bool = False

    def rows(self) -> list["Row"]:
        """Rows of the table, one for each baseline of vavae; where there is none, one of vavae alone."""
        baselines = dict(self.values)
        vavae = baselines.pop(VAVAE_SIDE)
        if not baselines:
            return [Row(self.benchmark, self.unit, "", None, statistics.median(vavae), ())]
        return [
            Row(
                self.benchmark,
                self.unit,
                against,
                statistics.median(baseline),
                statistics.median(vavae),
                ratios_of(baseline, vavae) if self.less_is_better else ratios_of(vavae, baseline),
            )
            for against, baseline in baselines.items()
        ]


class Row(NamedTuple):
    """Row of the table: vavae against one baseline, medians over the rounds."""

    benchmark: str
    unit: str
    against: str
    """Name of the baseline."""
    baseline: float | None
    """Value of the baseline; None where there is none."""
    vavae: float
    ratios: tuple[float, ...]
    """Ratios in favor of vavae, one a round."""


class Skipped(NamedTuple):
    """Benchmark that cannot be run here."""

    benchmark: str
    reason: str


def run_interleaved(benchmark: Benchmark, rounds: int) -> Measurement:
    """Run every side in turn, `rounds` times over after a warm-up that does not count."""
    for warm_up in benchmark.sides.values():
        warm_up()
    values = take_turns(benchmark.sides, rounds)
    return Measurement(benchmark.name, benchmark.unit, values, benchmark.less_is_better)


def take_turns(sides: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, tuple[T, ...]]:
    """Give every side its turn, `rounds` times over: A B A B. Returns what the turns of each side returned."""
    results: dict[str, list[T]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, turn in sides.items():
            results[side].append(turn())
    return {side: tuple(found) for side, found in results.items()}


def ratios_of(values: Sequence[float], others: Sequence[float]) -> tuple[float, ...]:
    """Ratios of values of one side to those of another, one a round."""
    return tuple(value / other for value, other in zip(values, others, strict=True))


def processor_rate(work: Callable[[], int]) -> Callable[[], float]:
    """Turns that measure samples per second of processor time, given work that returns how many samples it took."""
    return lambda: _rate(work, time.process_time)


def wall_rate(work: Callable[[], int]) -> Callable[[], float]:
    """Turns that measure samples per second on the wall clock, given work that returns how many samples it took."""
    return lambda: _rate(work, time.perf_counter)


def _rate(work: Callable[[], int], clock: Callable[[], float]) -> float:
    with without_collections():
        start = clock()
        count = work()
        return count / (clock() - start)


@contextmanager
def without_collections() -> Iterator[None]:
    """Hold Python's garbage collector back, as timeit does.

    A collection walks through all that was ever imported, whosever turn it is.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def machine(*packages: str) -> str:
    """Line with processor, cores, and versions of torch and of those packages that are installed."""
    versions = ", ".join(f"{name} {version}" for name in ("torch", *packages) if (version := installed_version(name)))
    return f"{processor_name()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def installed_version(distribution: str) -> str | None:
    """Version of a package, or None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def table_head() -> str:
    """Head of the table, two lines of Markdown."""
    rule = "|".join("-" * (width + 2) for width in _COLUMNS.values())
    return f"{_line(*_COLUMNS)}\n|{rule}|"


def table_line(row: Row) -> str:
    """Line of the table for one row."""
    baseline = "" if row.baseline is None else number(row.baseline)
    ratio = f"{statistics.median(row.ratios):.2f}x" if row.ratios else ""
    spread = f"{min(row.ratios):.2f} to {max(row.ratios):.2f}" if row.ratios else ""
    return _line(row.benchmark, row.unit, row.against, baseline, number(row.vavae), ratio, spread)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown of a table whose columns are as wide as their cells."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, _COLUMNS.values(), strict=True)) + " |"


def number(value: float) -> str:
    """Text of a number, with three digits at least unless it is a whole one."""
    if abs(value) >= 100 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
