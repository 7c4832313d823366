"""``vavae bench data | metrics | checkpoint``: benchmarks of this machine, vavae and its baselines interleaved."""

import argparse
from collections.abc import Callable
from typing import Any

from vavae.bench.benchmark import Skipped, machine, table_head, table_line


def add_commands(commands: Any) -> None:
    """Add ``vavae bench`` with its benchmarks; ``act`` of their arguments returns the exit status."""
    bench = commands.add_parser("bench", help="measure parts of this machine's pipeline")
    commands = bench.add_subparsers(required=True, metavar="WHAT")
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


def _command(
    commands: Any, name: str, text: str, rounds: int, act: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.add_argument("--rounds", type=int, default=rounds, help="turns of each side; default: %(default)s")
    command.set_defaults(act=act)
    return command


def _data(arguments: argparse.Namespace) -> int:
    from vavae.bench.data.run import Sizes, run

    print(f"{machine('webdataset', 'litdata', 'mosaicml-streaming')}\n\n{table_head()}", flush=True)
    left_out = []
    for found in run(arguments.rounds, Sizes()):
        if isinstance(found, Skipped):
            left_out.append(f"{found.benchmark} is left out: {found.reason}")
        else:
            print(table_line(found), flush=True)
    print(*left_out, sep="\n")
    return 0


def _metrics(arguments: argparse.Namespace) -> int:
    from vavae.bench.benchmark import run_interleaved
    from vavae.bench.metrics import benchmarks

    print(f"{machine('numpy', 'scipy', 'torch-fidelity')}\n\n{table_head()}", flush=True)
    for benchmark in benchmarks(arguments.images, arguments.dimensions):
        for row in run_interleaved(benchmark, arguments.rounds):
            print(table_line(row), flush=True)
    return 0


def _checkpoint(arguments: argparse.Namespace) -> int:
    from vavae.bench.benchmark import run_interleaved
    from vavae.bench.checkpoint import stall_benchmark

    print(f"{machine('safetensors')}\n\n{table_head()}", flush=True)
    with stall_benchmark(arguments.parameters) as benchmark:
        for row in run_interleaved(benchmark, arguments.rounds):
            print(table_line(row), flush=True)
    return 0
