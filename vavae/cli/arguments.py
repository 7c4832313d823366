"""Arguments that several commands share."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vavae.errors import UserError

if TYPE_CHECKING:
    from vavae.runs.run import Run


def add_config(command: argparse.ArgumentParser) -> None:
    """Add the configuration file of a run, and the overrides of its keys."""
    text = "the YAML configuration of the run, or the name of one that comes along, such as quickstart"
    command.add_argument("--config", required=True, metavar="FILE", help=text)
    add_overrides(command)


def add_overrides(command: argparse.ArgumentParser) -> None:
    """Add the overrides of keys, which stand last."""
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="set one key, value in YAML")


def add_hourly_price(command: argparse.ArgumentParser) -> None:
    """Add the price that stands in for the configured one."""
    command.add_argument("--hourly-price", type=float, metavar="PRICE", help="what a worker costs in an hour")


def open_run(place: str, overrides: Sequence[str]) -> "Run":
    """Open the run in a folder, or of a configuration file.

    Args:
        place: path or URL of the folder, or path of the file.
        overrides: `key.path=value`.

    Raises:
        UserError: there is no run.
    """
    from vavae.config.load import load
    from vavae.runs.config import RunConfig
    from vavae.runs.run import Run

    if not place.endswith((".yaml", ".yml")):
        return Run.at(place, overrides)
    run = Run(load(RunConfig, place, overrides))
    if not run.storage.exists():
        raise UserError(f"{run.storage.url()}: nothing there yet; start the run, or name another")
    return run
