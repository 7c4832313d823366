"""The console command ``vavae``: what needs no cluster, and how to reach one."""

import sys
from collections.abc import Sequence

from ray_jobs.submission.command import add_commands as add_submission_commands
from vavae.cli import average, bench, data, demo, import_export, plan, push, report, sample, status, train
from vavae.command import Parser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    parser = Parser("vavae", description="VA-VAE and LightningDiT, here and on a cluster.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (status, plan, train, average, import_export, push, sample, demo, report):
        module.add_commands(commands)
    add_submission_commands(commands)
    for module in (data, bench):
        module.add_commands(commands)
    # argparse closes the list of overrides at the first option; those that stand after one are left over.
    arguments, overrides = parser.parse_known_args(argv)
    if any(override.startswith("-") for override in overrides) or (overrides and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    if overrides:
        arguments.overrides += overrides
    return run_command(lambda: arguments.act(arguments))


if __name__ == "__main__":
    sys.exit(main())
