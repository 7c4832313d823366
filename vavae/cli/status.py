"""``vavae status``: progress of a run, from its storage alone: without its cluster, its images or its processes."""

import argparse
from datetime import datetime, timezone
from typing import Any

from vavae.cli.arguments import add_hourly_price
from vavae.errors import UserError


def add_commands(commands: Any) -> None:
    """Add ``vavae status``; ``act`` of its arguments returns the exit status."""
    status = commands.add_parser("status", help="say what a run has and what is still to do, from its storage alone")
    status.set_defaults(act=_status)
    status.add_argument(
        "--config", metavar="FILE", help="the YAML configuration of the run, in place of its folder: compares the two"
    )
    add_hourly_price(status)
    status.add_argument(
        "overrides",
        nargs="*",
        metavar="RUN | key.path=value",
        help="folder or URL of the run, or of runs; set one key",
    )


def _status(arguments: argparse.Namespace) -> int:
    from vavae.config.load import load
    from vavae.report.run_list import list_runs, runs_in
    from vavae.report.run_status import run_cost, run_status
    from vavae.runs.config import RunConfig
    from vavae.runs.run import Run
    from vavae.storage.storage import Storage

    if arguments.config is None and arguments.overrides and runs_in(folder := Storage(arguments.overrides[0])):
        for listed in list_runs(folder, arguments.overrides[1:]):
            print(f"{listed.name}  {listed.state}")
        return 0
    if arguments.config is not None:
        run = Run(load(RunConfig, arguments.config, arguments.overrides))
    elif arguments.overrides:
        run = Run.at(arguments.overrides[0], arguments.overrides[1:])
    else:
        raise UserError("name the run: the folder storage.root/name, or --config FILE")
    run = run.snapshot()
    for job in run_status(run, run.plans(sources=arguments.config is not None)):
        print(job.line(datetime.now(timezone.utc)))
    price = run.config.workers.hourly_price if arguments.hourly_price is None else arguments.hourly_price
    if price is not None:
        print(f"cost so far: {run_cost(run, price):,.2f} at {price:g} per worker and hour")
    return 0
