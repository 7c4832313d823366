"""``vavae bench metrics``."""

import argparse
from typing import Any

from vavae.bench.benchmark import machine, table_head, table_line


def add_command(commands: Any) -> None:
    """Give ``vavae bench`` the command ``metrics``; ``act`` of the arguments returns the exit status."""
    text = (
        "compare the arithmetic of Fréchet distances: time, memory, ratios (above 1: ours is better), and their range"
    )
    metrics = commands.add_parser("metrics", help=text, description=text)
    metrics.add_argument("--rounds", type=int, default=5, help="turns of each side; default: %(default)s")
    metrics.add_argument("--images", type=int, default=50_000, help="of a set; default: %(default)s")
    metrics.add_argument("--dimensions", type=int, default=2_048, help="of their features; default: %(default)s")
    metrics.set_defaults(act=_metrics)


def _metrics(arguments: argparse.Namespace) -> int:
    from vavae.bench.benchmark import run_interleaved
    from vavae.bench.metrics import benchmarks

    print(f"{machine('numpy', 'scipy', 'torch-fidelity')}\n\n{table_head()}", flush=True)
    for benchmark in benchmarks(arguments.images, arguments.dimensions):
        for row in run_interleaved(benchmark, arguments.rounds):
            print(table_line(row), flush=True)
    return 0
