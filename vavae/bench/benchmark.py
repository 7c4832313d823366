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
"""Names and widths."""


class Benchmark(NamedTuple):
    """Sides that do the same work."""

    name: str
    unit: str
    sides: Mapping[str, Callable[[], float]]
    """One turn of each side by name, returning its figure in the unit; `vavae` is one of them."""
    less_is_better: bool = False


class Row(NamedTuple):
    """A line of the table: vavae against one baseline, medians over the rounds."""

    benchmark: str
    unit: str
    baseline: str
    baseline_side: float | None
    vavae_side: float
    ratios: tuple[float, ...]
    """Ratios in favor of vavae, one a round."""


class LeftOut(NamedTuple):
    """A benchmark that cannot be run here."""

    benchmark: str
    reason: str


def run_interleaved(benchmark: Benchmark, rounds: int) -> list[Row]:
    """Run every side in turn, `rounds` times over after a warm-up that does not count."""
    for warm_up in benchmark.sides.values():
        warm_up()
    figures: dict[str, list[float]] = {side: [] for side in benchmark.sides}
    for _ in range(rounds):
        for side, turn in benchmark.sides.items():
            figures[side].append(turn())
    vavae_side = figures.pop(VAVAE_SIDE)
    return [
        Row(
            benchmark.name,
            benchmark.unit,
            baseline,
            statistics.median(baseline_side),
            statistics.median(vavae_side),
            ratios,
        )
        for baseline, baseline_side in figures.items()
        for ratios in [tuple(_times_better(benchmark, *pair) for pair in zip(vavae_side, baseline_side, strict=True))]
    ]


def _times_better(benchmark: Benchmark, vavae_side: float, baseline_side: float) -> float:
    return baseline_side / vavae_side if benchmark.less_is_better else vavae_side / baseline_side


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
    baseline_side = "" if row.baseline_side is None else _figure(row.baseline_side)
    ratio = f"{statistics.median(row.ratios):.2f}x" if row.ratios else ""
    spread = f"{min(row.ratios):.2f} to {max(row.ratios):.2f}" if row.ratios else ""
    return _line(row.benchmark, row.unit, row.baseline, baseline_side, _figure(row.vavae_side), ratio, spread)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, _COLUMNS.values(), strict=True)) + " |"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
