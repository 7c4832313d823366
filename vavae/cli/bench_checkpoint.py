"""``vavae bench checkpoint``."""

import argparse
from typing import Any

from vavae.bench.benchmark import machine, table_head, table_line


def add_command(commands: Any) -> None:
    """Give ``vavae bench`` the command ``checkpoint``; ``act`` of the arguments returns the exit status."""
    text = "measure for how long a checkpoint holds a training up, beside writing it at once and beside the copy alone"
    checkpoint = commands.add_parser("checkpoint", help=text, description=text)
    checkpoint.add_argument("--rounds", type=int, default=7, help="turns of each side; default: %(default)s")
    checkpoint.add_argument("--parameters", type=int, default=32_000_000, help="of the model; default: %(default)s")
    checkpoint.set_defaults(act=_checkpoint)


def _checkpoint(arguments: argparse.Namespace) -> int:
    from vavae.bench.benchmark import run_interleaved
    from vavae.bench.checkpoint import stall_benchmark

    print(f"{machine('safetensors')}\n\n{table_head()}", flush=True)
    with stall_benchmark(arguments.parameters) as benchmark:
        for row in run_interleaved(benchmark, arguments.rounds):
            print(table_line(row), flush=True)
    return 0
