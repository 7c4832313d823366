"""Table of all benchmarks of a GPU machine, within ten minutes; on a CPU the same at tiny sizes."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vavae.bench.benchmark import Measurement, Skipped, markdown, number, ratios_of, run_interleaved
from vavae.bench.checkpoint import stall_benchmark
from vavae.bench.computation import FLOPS, MEMORY, PEAK_SHARE, RATE, WALL
from vavae.bench.data.run import Sizes
from vavae.bench.data.run import run as run_data
from vavae.bench.extraction import extraction_benchmark
from vavae.bench.lightningdit import WAYS, Way, lightningdit_benchmark
from vavae.bench.metrics import benchmarks as metrics_benchmarks
from vavae.bench.process import run_within
from vavae.bench.run import Measured, configure, machine_with, measure_all
from vavae.bench.sampling import sampling_benchmark
from vavae.bench.tokenizer import tokenizer_benchmarks
from vavae.config.load import load
from vavae.distributed.world import World
from vavae.runs.config import RunConfig

_HEAD = ("benchmark", "side", "value", RATE, FLOPS, PEAK_SHARE, MEMORY, "ratio", "range")
_SMALL = Path(__file__).parent / "configs"


class Part(NamedTuple):
    """One benchmark of the table, in a process of its own."""

    name: str
    seconds: float
    """When they are over it is given up."""
    function: Callable[..., list[Measured] | list[Measured | Skipped]]
    arguments: tuple[Any, ...]


def gpu_table(on_gpu: bool) -> str:
    """Run all parts, one after another, and return the table as Markdown; a part that fails says so in its row.

    Args:
        on_gpu: take the sizes of a GPU; otherwise tiny ones on the CPU.
    """
    rows: list[Sequence[str]] = []
    for part in parts(on_gpu):
        rows += rows_of(part)
    machine = run_within(60, _machine, on_gpu)
    return f"{machine}\n\n{markdown(_HEAD, rows)}"


def rows_of(part: Part) -> list[Sequence[str]]:
    """Run a part and return its rows, or one with the error that ended it."""
    try:
        measured = run_within(part.seconds, part.function, *part.arguments)
    except Exception as error:  # noqa: BLE001 (whatever ends one part, the others have their turn)
        return [_note(part.name, f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")]
    return [row for found in measured for row in _rows(found)]


def parts(on_gpu: bool) -> list[Part]:
    """The parts; their times add up to less than ten minutes."""
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if not on_gpu:
        small = str(_SMALL / "tokenizer.yaml")
        dit = ["lightningdit.depth=1", "lightningdit.width=32", "lightningdit.heads=2"]
        vae = ["tokenizer.channel_multipliers=[1,1,1]", "tokenizer.attention_levels=[]", "losses.perceptual.kind=none"]
        batches = ["train_vavae.batch_size=1", "latents.batch_size=2", "losses.adversarial.layers=1"]
        tiny = [*dit, *vae, *batches, "shards.image_size=16"]
        sampled = [*tiny, "solver.num_steps=2", "sample.batch_size=2"]
        return [
            Part("train-lightningdit", 120, _lightningdit, (small, tiny, ["eager"], 1, device)),
            Part("train-vavae", 120, _tokenizer, (small, tiny, 1, device)),
            Part("latents", 60, _latents, (small, tiny, 2, 1, device)),
            Part("sample", 60, _sample, (small, sampled, 1, device)),
            Part("checkpoint", 60, _checkpoint, (1_000_000, 1, device)),
            Part("data", 100, _data, (Sizes(images=32, latents=64, shards=40), 1)),
            Part("metrics", 60, _metrics, (200, 16, 1)),
        ]
    # What one of eight GPUs has to do of a step: its share of the batch, in as many passes as the presets take.
    alone = ["workers.count=1", "stream.lanes=4", "lightningdit.classes=1000"]
    dit = [*alone, "train_lightningdit.batch_size=128", "train_vavae.batch_size=32"]
    sampled = [*dit, "solver.num_steps=16", "sample.batch_size=64"]
    xl, f16d32 = (f"imagenet/{name}" for name in ("lightningdit_xl_64_epochs", "f16d32_dinov2"))
    return [
        Part("train-lightningdit", 160, _lightningdit, (xl, [*dit, "stream.lanes=2"], WAYS[:2], 5, device)),
        Part("train-vavae", 150, _tokenizer, (f16d32, dit, 3, device)),
        Part("latents", 50, _latents, (f16d32, dit, 512, 3, device)),
        Part("sample", 60, _sample, (xl, sampled, 3, device)),
        Part("checkpoint", 40, _checkpoint, (32_000_000, 3, device)),
        Part("data", 70, _data, (Sizes(images=512, latents=1024, shards=100), 3)),
        Part("metrics", 40, _metrics, (10_000, 2_048, 3)),
    ]


def _lightningdit(
    file: str, overrides: Sequence[str], ways: Sequence[Way], rounds: int, device: torch.device
) -> list[Measured]:
    config, world = _load(file, overrides, device), World(device=device)
    return list(measure_all([lightningdit_benchmark(config, world, ways)], rounds, world))


def _tokenizer(file: str, overrides: Sequence[str], rounds: int, device: torch.device) -> list[Measured]:
    config, world = _load(file, overrides, device), World(device=device)
    return list(measure_all(tokenizer_benchmarks(config, world), rounds, world))


def _latents(file: str, overrides: Sequence[str], images: int, rounds: int, device: torch.device) -> list[Measured]:
    config, world = _load(file, overrides, device), World(device=device)
    with extraction_benchmark(config, device, images) as computation:
        return list(measure_all([computation], rounds, world))


def _sample(file: str, overrides: Sequence[str], rounds: int, device: torch.device) -> list[Measured]:
    config = _load(file, overrides, device)
    return list(measure_all([sampling_benchmark(config, device)], rounds, World(device=device)))


def _load(file: str, overrides: Sequence[str], device: torch.device) -> RunConfig:
    config = load(RunConfig, file, overrides)
    if device.type == "cpu":
        torch.set_num_threads(1)  # the sizes are too small for two, which would wait for each other
    configure(config.workers)
    return config


def _checkpoint(parameters: int, rounds: int, device: torch.device) -> list[Measured]:
    with stall_benchmark(parameters, device) as benchmark:
        return [Measured([run_interleaved(benchmark, rounds)], [])]


def _data(sizes: Sizes, rounds: int) -> list[Measured | Skipped]:
    found = run_data(rounds, sizes)
    return [each if isinstance(each, Skipped) else Measured([each], []) for each in found]


def _metrics(images: int, dimensions: int, rounds: int) -> list[Measured]:
    return [Measured([run_interleaved(each, rounds)], []) for each in metrics_benchmarks(images, dimensions)]


def _machine(on_gpu: bool) -> str:
    return machine_with(torch.device("cuda", 0) if on_gpu else torch.device("cpu"))


def _rows(measured: Measured | Skipped) -> list[Sequence[str]]:
    """Rows of a computation, one a side; or of a benchmark against baselines; or of one that is left out."""
    if isinstance(measured, Skipped):
        return [_note(measured.benchmark, f"left out: {measured.reason}")]
    if not measured.pairs:
        return [
            (
                row.benchmark,
                f"vavae, {row.unit}",
                number(row.vavae),
                *[""] * 4,
                *_ratio(row.ratios, f"x as good as {row.against}"),
            )
            for (measurement,) in [measured.measurements]
            for row in measurement.rows()
        ]
    by_unit = {measurement.unit: measurement for measurement in measured.measurements}
    wall = by_unit[WALL]
    rows: list[Sequence[str]] = []
    for side, values in wall.values.items():
        rates = [_median(by_unit.get(unit), side) for unit in (RATE, FLOPS, PEAK_SHARE, MEMORY)]
        against = next((other for each, other in measured.pairs if each == side), None)
        ratio = (
            ("", "")
            if against is None
            else _ratio(ratios_of(values, wall.values[against]), f" of the time of {against}")
        )
        rows.append((wall.benchmark, side, f"{number(statistics.median(values))} s", *rates, *ratio))
    return rows


def _note(benchmark: str, text: str) -> Sequence[str]:
    """Row of what has no numbers."""
    return benchmark, text.replace("|", "/"), *[""] * (len(_HEAD) - 2)


def _median(measurement: Measurement | None, side: str) -> str:
    values = () if measurement is None else measurement.values.get(side, ())
    return number(statistics.median(values)) if values else ""


def _ratio(ratios: Sequence[float], words: str) -> tuple[str, str]:
    if not ratios:
        return "", ""
    return f"{statistics.median(ratios):.2f}{words}", f"{min(ratios):.2f} to {max(ratios):.2f}"
