"""Measurement of computations one after another, with a trace where one is wanted; and the machine that they run on."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from vavae.bench.benchmark import Measurement, machine
from vavae.bench.computation import COMMUNICATION, Computation, measure, ratio_table, side_table
from vavae.bench.profile import profile_turn
from vavae.distributed.config import WorkersConfig
from vavae.distributed.torch_settings import configure_torch
from vavae.distributed.world import World


def configure(workers: WorkersConfig) -> None:
    """Set up torch as for the workers of a run, but with its own number of threads: nothing else runs here."""
    configure_torch(workers.model_copy(update={"threads": torch.get_num_threads()}))


def machine_with(device: torch.device, *packages: str) -> str:
    """Line with the device, and what `machine` says."""
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    return f"{gpu}{machine(*packages)}; torch with {torch.get_num_threads()} threads"


class Measured(NamedTuple):
    """A computation that has been measured."""

    measurements: list[Measurement]
    pairs: list[tuple[str, str]]
    """Sides to be compared, each with the one that it is divided by."""

    def __str__(self) -> str:
        """Table of the sides, and table of their ratios."""
        return f"{side_table(self.measurements)}\n\n{ratio_table(self.measurements, self.pairs)}\n"


def measure_all(
    computations: Iterable[Computation], rounds: int, world: World, trace: Path | None = None
) -> Iterator[Measured]:
    """Measure computations, each before the next is built. Every rank calls it.

    Args:
        computations: what to measure.
        rounds: turns of each side.
        world: the ranks.
        trace: file for a trace of one more turn of the first side; of several computations that of the last stays.
    """
    for computation in computations:
        found = measure(computation, rounds)
        if trace is not None or world.size > 1:
            found += _profile(computation, world, trace)
        yield Measured(found, list(computation.pairs))
        del computation  # its models, before others are built


def _profile(computation: Computation, world: World, trace: Path | None) -> list[Measurement]:
    """The host's waits in one turn of the first side, and between several ranks the share of communication."""
    side, work = next(iter(computation.sides.items()))
    with tempfile.TemporaryDirectory(prefix="vavae-") as folder:
        file = trace if trace is not None and world.is_first else Path(folder, "trace.json")
        found = profile_turn(work.turn, computation.device, file)
    measurements = [
        Measurement(computation.name, f"{name} in one turn", {side: (float(count),)}, less_is_better=True)
        for name, count in found.waits.items()
    ]
    if world.size > 1:
        share = {side: (found.communication,)}
        measurements.append(Measurement(computation.name, COMMUNICATION, share, less_is_better=True))
    return measurements
