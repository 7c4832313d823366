"""``vavae bench data``."""

import argparse
from typing import Any

from vavae.bench.benchmark import LeftOut, machine, table_head, table_line


def add_command(commands: Any) -> None:
    """Give ``vavae bench`` the command ``data``; ``act`` of the arguments returns the exit status."""
    text = "compare readers of shards: rates, ratios to other readers (above 1: ours is better), and their range"
    data = commands.add_parser("data", help=text, description=text)
    data.add_argument("--rounds", type=int, default=7, help="turns of each side; default: %(default)s")
    data.set_defaults(act=_data)


def _data(arguments: argparse.Namespace) -> int:
    from vavae.bench.data.run import Sizes, run

    print(f"{machine('webdataset', 'litdata', 'mosaicml-streaming')}\n\n{table_head()}", flush=True)
    left_out = []
    for found in run(arguments.rounds, Sizes()):
        if isinstance(found, LeftOut):
            left_out.append(f"{found.benchmark} is left out: {found.reason}")
        else:
            print(table_line(found), flush=True)
    print(*left_out, sep="\n")
    return 0
