"""The console command ``vavae``: what needs no cluster."""

import argparse
import sys
from collections.abc import Sequence

from vavae.config.command import run_command
from vavae.config.load import load
from vavae.training.config import RunConfig
from vavae.training.run import Job, Run

_MODELS: dict[str, Job] = {"vavae": "train_vavae", "lightningdit": "train_lightningdit"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        "vavae", description="VA-VAE and LightningDiT without a cluster.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    status = commands.add_parser("status", help="say what a run has and what is still to do")
    status.set_defaults(act=_status)
    train = commands.add_parser("train", help="train one model in this process, or under torchrun in several")
    train.add_argument("model", choices=list(_MODELS))
    train.set_defaults(act=_train)
    for command in (status, train):
        command.add_argument("--config", required=True, metavar="FILE", help="the YAML configuration of the run")
        command.add_argument("overrides", nargs="*", metavar="key.path=value", help="set one key, value in YAML")
    arguments = parser.parse_args(argv)
    return run_command(lambda: arguments.act(arguments))


def _status(arguments: argparse.Namespace) -> int:
    run = Run(load(RunConfig, arguments.config, arguments.overrides))
    for job, plan in run.plans().items():
        state = "done" if plan.done else "to do"
        print(f"{job:<18} {state:<6} {plan.why}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    # torch and DeepSpeed take seconds to import, and `status` needs neither.
    import torch

    from vavae.distributed.world import World, process_group
    from vavae.training.jobs import TRAININGS
    from vavae.training.session import LocalSession

    run = Run(load(RunConfig, arguments.config, arguments.overrides))
    torch.set_num_threads(run.config.workers.threads)
    with process_group(run.config.workers.use_gpu):
        TRAININGS[_MODELS[arguments.model]](run, LocalSession(), World.current(run.config.workers.use_gpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
