"""Benchmarks of computation on one device: time by both clocks, and on a GPU its rates and memory.

The clock of the wall stops when the device is done with all that it was given.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from vavae.bench.benchmark import Measurement, markdown, number, ratios_of, take_turns, without_collections
from vavae.distributed.config import Precision
from vavae.training.flops.gpus import gpu_of_device

PROCESSOR, WALL = "s of processor", "s on the wall"
RATE, FLOPS, PEAK_SHARE, MEMORY = "img/s", "TFLOP/s", "of peak", "MiB at most"
COMMUNICATION = "communication"
"""Share of a turn in which ranks exchange."""
_MEBIBYTE = 2**20


class Side(NamedTuple):
    """Work that takes turns with others."""

    turn: Callable[[], object]
    flops: float | None
    """FLOPs of one turn, as `vavae.training.flops` counts them; None where nobody asks, which is on a CPU."""
    held_bytes: int
    """Memory of a GPU that it holds between its turns."""


class Computation(NamedTuple):
    """Sides that do equal work, or some part of it, on one device."""

    name: str
    images: int
    """Images of one turn."""
    sides: Mapping[str, Side]
    pairs: Sequence[tuple[str, str]]
    """Sides to be compared, each with the one that it is divided by."""
    device: torch.device
    peak: float | None
    """FLOP/s that the device can do at most; None where it is not known."""


class _Cost(NamedTuple):
    processor: float
    wall: float
    bytes: int


def build_side(build: Callable[[], Callable[[], object]], flops: Callable[[], float], device: torch.device) -> Side:
    """Build a side and give it a turn that does not count, in which compilers and allocators do their work.

    Args:
        build: makes the turns.
        flops: counts the FLOPs of one; called on a GPU alone, because it takes seconds.
        device: device of the side.
    """
    before = _allocated(device)
    turn = build()
    turn()
    return Side(turn, flops() if device.type == "cuda" else None, _allocated(device) - before)


def dense_peak(device: torch.device, precision: Precision, tf32: bool) -> float | None:
    """FLOP/s of a GPU without sparsity; None for what is not in `GPUS`."""
    gpu = gpu_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return None
    if precision == "bf16":
        return gpu.bf16
    return gpu.tf32 if tf32 else gpu.fp32


def measure(computation: Computation, rounds: int) -> list[Measurement]:
    """Measure every side in turn, `rounds` times over.

    Returns:
        Seconds by both clocks, and images/s; on a GPU also TFLOP/s, their share of the peak where that is known, and
        the most memory that a side alone would take.
    """
    device, sides = computation.device, computation.sides
    costs = take_turns({name: partial(_cost, side.turn, device) for name, side in sides.items()}, rounds)

    def measurement(
        unit: str, value: Callable[[Side, _Cost], float], names: Iterable[str] = sides, less_is_better: bool = False
    ) -> Measurement:
        values = {name: tuple(value(sides[name], cost) for cost in costs[name]) for name in names}
        return Measurement(computation.name, unit, values, less_is_better)

    found = [
        measurement(PROCESSOR, lambda _, cost: cost.processor, less_is_better=True),
        measurement(WALL, lambda _, cost: cost.wall, less_is_better=True),
        measurement(RATE, lambda _, cost: computation.images / cost.wall),
    ]
    counted = {name: side.flops for name, side in sides.items() if side.flops is not None}
    if counted:
        found.append(measurement(FLOPS, lambda side, cost: (side.flops or 0) / cost.wall / 1e12, counted))
    peak = computation.peak
    if counted and peak is not None:
        found.append(measurement(PEAK_SHARE, lambda side, cost: (side.flops or 0) / cost.wall / peak, counted))
    if device.type == "cuda":
        found.append(
            measurement(MEMORY, lambda side, cost: (side.held_bytes + cost.bytes) / _MEBIBYTE, less_is_better=True)
        )
    return found


def _cost(turn: Callable[[], object], device: torch.device) -> _Cost:
    on_gpu = device.type == "cuda"
    with without_collections():
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        held = _allocated(device)
        processor, wall = time.process_time(), time.perf_counter()
        turn()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.process_time() - processor, time.perf_counter() - wall
        return _Cost(*seconds, torch.cuda.max_memory_allocated(device) - held if on_gpu else 0)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def side_table(measurements: Sequence[Measurement]) -> str:
    """Table of one computation, a side a row: medians over the rounds, and their range."""
    (name,) = {measurement.benchmark for measurement in measurements}
    sides = list(dict.fromkeys(side for measurement in measurements for side in measurement.values))
    rows = [[side, *(_spread(found.values.get(side, ())) for found in measurements)] for side in sides]
    return markdown([name, *(measurement.unit for measurement in measurements)], rows)


def ratio_table(measurements: Sequence[Measurement], pairs: Sequence[tuple[str, str]]) -> str:
    """Table of the ratios of the times of some sides to those of others: medians over the rounds, and their range."""
    times = [found for found in measurements if found.unit in (PROCESSOR, WALL)]
    rows = [
        [side, against, *(_spread(ratios_of(found.values[side], found.values[against])) for found in times)]
        for side, against in pairs
    ]
    return markdown(["time of", "in units of", *(f"ratio of {found.unit}" for found in times)], rows)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    median = number(statistics.median(values))
    return median if len(values) == 1 else f"{median} ({number(min(values))} to {number(max(values))})"
