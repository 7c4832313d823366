"""Arguments that several commands share."""

import argparse


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
