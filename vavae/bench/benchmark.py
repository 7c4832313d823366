"""Benchmarks whose sides do equal work and take turns, and the table of their results."""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import NamedTuple

from vavae.hardware import processor_name

VAVAE_SIDE = "vavae"
_COLUMNS = {"benchmark": 24, "unit": 20, "against": 18, "baseline": 9, VAVAE_SIDE: 9, "ratio": 7, "range": 16}
"""Names and widths of the columns."""


class Benchmark(NamedTuple):
    """Sides that do equal work."""

    name: str
    unit: str
    sides: Mapping[str, Callable[[], float]]
    """One turn of each side by name, which returns its value in the unit; `vavae` is one of them."""
    less_is_better: bool = False


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


def run_interleaved(benchmark: Benchmark, rounds: int) -> list[Row]:
    """Run every side in turn, `rounds` times over after a warm-up that does not count."""
    for warm_up in benchmark.sides.values():
        warm_up()
    values: dict[str, list[float]] = {side: [] for side in benchmark.sides}
    for _ in range(rounds):
        for side, turn in benchmark.sides.items():
            values[side].append(turn())
    vavae = values.pop(VAVAE_SIDE)
    return [
        Row(
            benchmark.name,
            benchmark.unit,
            against,
            statistics.median(baseline),
            statistics.median(vavae),
            tuple(b / v if benchmark.less_is_better else v / b for v, b in zip(vavae, baseline, strict=True)),
        )
        for against, baseline in values.items()
    ]


def processor_rate(work: Callable[[], int]) -> Callable[[], float]:
    """Turns that measure samples per second of processor time, given work that returns how many samples it took."""
    return lambda: _rate(work, time.process_time)


def wall_rate(work: Callable[[], int]) -> Callable[[], float]:
    """Turns that measure samples per second on the wall clock, given work that returns how many samples it took."""
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
    baseline = "" if row.baseline is None else _number(row.baseline)
    ratio = f"{statistics.median(row.ratios):.2f}x" if row.ratios else ""
    spread = f"{min(row.ratios):.2f} to {max(row.ratios):.2f}" if row.ratios else ""
    return _line(row.benchmark, row.unit, row.against, baseline, _number(row.vavae), ratio, spread)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, _COLUMNS.values(), strict=True)) + " |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
