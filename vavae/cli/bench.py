"""``vavae bench``: benchmarks of this machine, fast paths interleaved with slow ones and with other software."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vavae.cli.arguments import add_overrides
from vavae.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import
    from vavae.bench.benchmark import Measurement, Skipped
    from vavae.bench.computation import Computation
    from vavae.bench.record import BenchmarkResults
    from vavae.distributed.world import World
    from vavae.runs.config import RunConfig

_CONFIGS = Path(__file__).parents[1] / "bench" / "configs"


def add_commands(commands: Any) -> None:
    """Add ``vavae bench`` with its benchmarks; ``act`` of their arguments returns the exit status."""
    text = "measure parts of this machine's pipeline, or all of it in one table"
    bench = commands.add_parser("bench", help=text, description=text)
    bench.add_argument("--gpu-table", action="store_true", help="run all at the sizes of a GPU, within ten minutes")
    bench.add_argument("--out", type=Path, metavar="FILE", help="of --gpu-table: write the table there, too")
    bench.set_defaults(act=_gpu_table, what=None)
    commands = bench.add_subparsers(metavar="WHAT", dest="what")

    text = "compare the LightningDiT's step, compiled, eager and by DeepSpeed, with its matrix products alone"
    dit = _computation(commands, "train-lightningdit", text, "lightningdit.yaml", 7, _train_lightningdit)
    dit.add_argument("--sides", default="compiled,eager,DeepSpeed", metavar="LIST", help="default: %(default)s")
    text = "a network with the constructor and names of the public code's LightningDiT, as one side more"
    dit.add_argument("--peer", metavar="MODULE:CLASS", help=text)
    text = "compare the tokenizer's step with exact adaptive weights, with refreshed and with constant ones"
    _computation(commands, "train-vavae", text, "tokenizer.yaml", 5, _train_vavae)
    text = "compare the extraction of latents with its encoder and its decoder of images, each alone"
    latents = _computation(commands, "latents", text, "tokenizer.yaml", 7, _latents)
    latents.add_argument("--images", type=int, default=64, help="of the shard; default: %(default)s")
    text = "compare sampling with its networks alone, and with guidance in two passes"
    _computation(commands, "sample", text, "tokenizer.yaml", 7, _sample)

    text = "compare readers of shards: rates, ratios to other readers (above 1: vavae is better), and their range"
    _command(commands, "data", text, 7, _data)
    text = (
        "compare the arithmetic of Fréchet distances: time, memory, ratios (above 1: vavae is better), and their range"
    )
    metrics = _command(commands, "metrics", text, 5, _metrics)
    metrics.add_argument("--images", type=int, default=50_000, help="of a set; default: %(default)s")
    metrics.add_argument("--dimensions", type=int, default=2_048, help="of their features; default: %(default)s")
    text = "measure for how long a checkpoint holds a training up, beside writing it at once and beside the copy alone"
    checkpoint = _command(commands, "checkpoint", text, 7, _checkpoint)
    checkpoint.add_argument("--parameters", type=int, default=32_000_000, help="of the model; default: %(default)s")
    _add_device(checkpoint)
    text = "compare a training as a job of Ray with the same one as a process of its own, by the rows of their logs"
    under_ray = _command(commands, "ray", text, 3, _ray)
    _add_configuration(under_ray, "training.yaml")


def _command(
    commands: Any, name: str, text: str, rounds: int, act: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.add_argument("--rounds", type=int, default=rounds, help="turns of each side; default: %(default)s")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    command.add_argument(
        "--compare", type=Path, metavar="FILE", help="of an earlier --json: print ratios to its medians"
    )
    command.set_defaults(act=lambda arguments: _run(act, arguments))
    return command


def _run(act: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    if arguments.gpu_table or arguments.out is not None:
        raise UserError(f"--gpu-table and --out are of all benchmarks: leave {arguments.what} out, or them")
    return act(arguments)


def _computation(
    commands: Any, name: str, text: str, config: str, rounds: int, act: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    command = _command(commands, name, text, rounds, act)
    _add_device(command)
    text = "write a trace of one more turn, for Perfetto or chrome://tracing, and count the host's waits in it"
    command.add_argument("--profile", type=Path, metavar="FILE", help=text)
    _add_configuration(command, config)
    return command


def _add_configuration(command: argparse.ArgumentParser, config: str) -> None:
    command.add_argument(
        "--config", default=str(_CONFIGS / config), metavar="FILE", help="configuration of a run; default: a small one"
    )
    add_overrides(command)


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")


def _train_lightningdit(arguments: argparse.Namespace) -> int:
    from vavae.bench.lightningdit import lightningdit_benchmark, parse_ways

    ways = parse_ways(arguments.sides)
    return _compute(arguments, lambda config, world: [lightningdit_benchmark(config, world, ways, arguments.peer)])


def _train_vavae(arguments: argparse.Namespace) -> int:
    from vavae.bench.tokenizer import tokenizer_benchmarks

    return _compute(arguments, tokenizer_benchmarks)


def _latents(arguments: argparse.Namespace) -> int:
    from vavae.bench.extraction import extraction_benchmark

    def computations(config: "RunConfig", world: "World") -> Iterator["Computation"]:
        with extraction_benchmark(config, world.device, arguments.images) as computation:
            yield computation

    return _compute(arguments, computations)


def _sample(arguments: argparse.Namespace) -> int:
    from vavae.bench.sampling import sampling_benchmark

    return _compute(arguments, lambda config, world: [sampling_benchmark(config, world.device)])


def _compute(
    arguments: argparse.Namespace, computations: Callable[["RunConfig", "World"], Iterable["Computation"]]
) -> int:
    """Run benchmarks of computation, under torchrun on every rank, and print their tables on the first."""
    from vavae.bench.run import configure, machine_with, measure_all
    from vavae.config.load import load
    from vavae.distributed.world import World, process_group
    from vavae.runs.config import RunConfig

    earlier, on_gpu = _earlier(arguments), _on_gpu(arguments)
    config = load(RunConfig, arguments.config, arguments.overrides)
    if arguments.what in ("train-vavae", "latents") and config.tokenizer.kind != "kl":
        raise UserError(
            f"tokenizer.kind={config.tokenizer.kind}: vavae bench {arguments.what} measures tokenizers of kind kl"
        )
    config = config.model_copy(update={"workers": config.workers.model_copy(update={"use_gpu": on_gpu})})
    configure(config.workers)
    with process_group(on_gpu, _COLLECTIVE_SECONDS):
        world = World.current(on_gpu)
        machine, measurements = machine_with(world.device), []
        if world.is_first:
            print(f"{machine}\n", flush=True)
        for measured in measure_all(computations(config, world), arguments.rounds, world, arguments.profile):
            measurements += measured.measurements
            if world.is_first:
                print(measured, flush=True)
        if world.is_first:
            _finish(arguments, machine, measurements, earlier)
    return 0


_COLLECTIVE_SECONDS = 600.0
"""Longest wait of a rank for the others: some compile for minutes."""


def _data(arguments: argparse.Namespace) -> int:
    from vavae.bench.benchmark import machine
    from vavae.bench.data.run import Sizes, run

    found = run(arguments.rounds, Sizes())
    return _against_baselines(arguments, machine("webdataset", "litdata", "mosaicml-streaming"), found)


def _metrics(arguments: argparse.Namespace) -> int:
    from vavae.bench.benchmark import machine, run_interleaved
    from vavae.bench.metrics import benchmarks

    found = (
        run_interleaved(benchmark, arguments.rounds) for benchmark in benchmarks(arguments.images, arguments.dimensions)
    )
    return _against_baselines(arguments, machine("numpy", "scipy", "torch-fidelity"), found)


def _checkpoint(arguments: argparse.Namespace) -> int:
    from vavae.bench.benchmark import run_interleaved
    from vavae.bench.checkpoint import stall_benchmark
    from vavae.bench.run import machine_with
    from vavae.distributed.world import World

    device = World.current(_on_gpu(arguments)).device
    with stall_benchmark(arguments.parameters, device) as benchmark:
        found = (run_interleaved(each, arguments.rounds) for each in [benchmark])
        return _against_baselines(arguments, machine_with(device, "safetensors"), found)


def _ray(arguments: argparse.Namespace) -> int:
    from vavae.bench.benchmark import machine, run_interleaved
    from vavae.bench.ray import ray_benchmark

    benchmark = ray_benchmark(arguments.config, arguments.overrides)
    found = (run_interleaved(each, arguments.rounds) for each in [benchmark])
    return _against_baselines(arguments, machine("ray"), found)


def _against_baselines(arguments: argparse.Namespace, machine: str, results: Iterable["Measurement | Skipped"]) -> int:
    """Print a line for each baseline of each benchmark as soon as it is measured."""
    from vavae.bench.benchmark import Skipped, table_head, table_line

    earlier = _earlier(arguments)
    print(f"{machine}\n\n{table_head()}", flush=True)
    measurements, left_out = [], []
    for found in results:
        if isinstance(found, Skipped):
            left_out.append(f"{found.benchmark} is left out: {found.reason}")
        else:
            measurements.append(found)
            print(*map(table_line, found.rows()), sep="\n", flush=True)
    if left_out:
        print(*left_out, sep="\n")
    _finish(arguments, machine, measurements, earlier)
    return 0


def _on_gpu(arguments: argparse.Namespace) -> bool:
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; leave it out to measure on the CPU")
    return arguments.device != "cpu" and torch.cuda.is_available()


def _earlier(arguments: argparse.Namespace) -> "BenchmarkResults | None":
    """The results to compare with; read before anything is measured, so that a wrong file costs no time."""
    from vavae.bench.record import BenchmarkResults

    return None if arguments.compare is None else BenchmarkResults.read(arguments.compare, arguments.what)


def _finish(
    arguments: argparse.Namespace,
    machine: str,
    measurements: Sequence["Measurement"],
    earlier: "BenchmarkResults | None",
) -> None:
    """Write the results and compare them, where either is wanted."""
    from vavae.bench.record import BenchmarkResults

    results = BenchmarkResults.of(arguments.what, machine, measurements)
    if arguments.json is not None:
        results.write(arguments.json)
    if earlier is not None:
        print(f"\n{results.compared_with(earlier, arguments.compare)}")


def _gpu_table(arguments: argparse.Namespace) -> int:
    if not arguments.gpu_table:
        raise UserError("nothing to measure: name a benchmark of `vavae bench --help`, or give --gpu-table")
    import torch

    from vavae.bench.gpu_table import gpu_table

    table = gpu_table(torch.cuda.is_available())
    print(table)
    if arguments.out is not None:
        arguments.out.write_text(f"{table}\n")
    return 0
