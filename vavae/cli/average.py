"""``vavae average``: an average of a run's weights by another power profile, reconstructed from its snapshots."""

import argparse
import re
from typing import Any

from vavae.errors import UserError
from vavae.progress import Progress, display


def add_commands(commands: Any) -> None:
    """Add ``vavae average``; ``act`` of its arguments returns the exit status."""
    average = commands.add_parser(
        "average", help="reconstruct an average of a LightningDiT's weights by another power profile"
    )
    average.add_argument("run", metavar="RUN", help="path or URL of the folder of the run")
    average.add_argument(
        "--std",
        required=True,
        type=float,
        metavar="S",
        help="standard deviation of the profile, relative to the images seen; such as 0.1",
    )
    average.add_argument("--images", type=int, metavar="N", help="images seen at its end; default: the last snapshot")
    average.add_argument("--name", help="name for sample.weights; default: std and S, and N where it is given")
    average.set_defaults(act=_average)


def _average(arguments: argparse.Namespace) -> int:
    from vavae.runs.run import Run
    from vavae.runs.training_config import WIDEST_STD
    from vavae.sampling.config import NAME_PATTERN
    from vavae.training.reconstruct_average import plan_reconstruction, reconstruct_average

    std, run = arguments.std, Run.at(arguments.run)
    training, images = run.config.train_lightningdit, arguments.images
    name = arguments.name or f"std{std:g}" + ("" if images is None else f"-{images}")
    if not 0 < std < WIDEST_STD:
        raise UserError(f"--std {std:g}: give a number between 0 and {WIDEST_STD:.4f}, that of equal weights")
    if re.fullmatch(NAME_PATTERN, name) is None:
        raise UserError(f"--name {name}: give letters, digits, dots, dashes and underscores")
    if training.average(name) is not None:
        raise UserError(f"--name {name}: the training keeps an average of that name; give another")
    run.require("train_lightningdit")
    found = plan_reconstruction(run.training_folder("train_lightningdit"), training, std, images)
    if found.warning is not None:
        print(found.warning)
    with display("average") as show:
        total = len(found.averages)
        record = reconstruct_average(
            run, name, found, lambda done: show(Progress("average", done, total, unit="averages"))
        )
    end = found.wished.images_seen
    print(
        f"{run.storage.url(run.average_prefix(name))}: {record.digest[:12]}, std {std:g} after {end:,} images from "
        f"{total} averages, profile within {found.sum.error:.2g}; sample it with sample.weights={name}"
    )
    return 0
