"""``vavae plan``: what a run would take on a cluster."""

import argparse
from typing import TYPE_CHECKING, Any

from vavae.cli.arguments import add_config
from vavae.errors import UserError
from vavae.planning.cluster import ClusterSpec, parse_gpus
from vavae.runs.jobs import TRAININGS

if TYPE_CHECKING:
    from vavae.runs.config import RunConfig

IMAGENET_IMAGES = 1_281_167


def add_commands(commands: Any) -> None:
    """Add ``vavae plan``; ``act`` of its arguments returns the exit status."""
    plan = commands.add_parser("plan", help="say what a run would take on a cluster: time, money, bytes, bottlenecks")
    default = ClusterSpec("H100", 1)
    plan.add_argument("--gpus", required=True, metavar="NxNAME", help="such as 64xH100")
    plan.add_argument("--price", type=float, metavar="P", help="of one GPU for an hour, in any currency")
    for option, kind, value, text in (
        ("--utilization", float, default.utilization, "share of the GPU's best rate that the networks reach"),
        ("--node-gpus", int, default.node_gpus, "GPUs of one machine"),
        ("--network-gbit", float, default.network * 8e-9, "Gbit/s of a machine to the others"),
        ("--store-gbit", float, default.store * 8e-9, "Gbit/s of a machine to and from the store"),
        ("--hours-between-failures", float, default.hours_between_failures, "of the whole cluster, with evictions"),
        ("--images", int, IMAGENET_IMAGES, "of the data set"),
    ):
        plan.add_argument(option, type=kind, default=value, metavar="N", help=f"{text}; default: %(default)g")
    plan.add_argument("--image-bytes", type=float, metavar="N", help="mean size of a stored image; default: guessed")
    add_config(plan)
    plan.set_defaults(act=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    # torch takes seconds to import.
    from vavae.config.load import load
    from vavae.planning.jobs import Dataset, estimate_jobs
    from vavae.planning.tables import print_plan
    from vavae.runs.config import RunConfig
    from vavae.training.ema import initial_share_warning

    cluster = _cluster(arguments)
    settings = _settings(load(RunConfig, arguments.config, arguments.overrides), cluster)
    config = load(RunConfig, arguments.config, [*arguments.overrides, *settings])
    jobs = estimate_jobs(config, cluster, Dataset(arguments.images, arguments.image_bytes))
    print_plan(jobs, cluster)
    warnings = (initial_share_warning(job, getattr(config, job)) for job in TRAININGS)
    for warning in filter(None, warnings):
        print(warning)
    print(f"run it with {' '.join(settings)}")
    print(
        f"assumed: {arguments.images:,} images; {cluster.utilization:.0%} of the GPU's best rate; "
        f"{cluster.node_gpus} GPUs a machine, {cluster.network * 8e-9:g} Gbit/s to others, {cluster.store * 8e-9:g} to "
        f"the store; a failure in {cluster.hours_between_failures:g} h. `vavae plan --help` says how to change it, "
        "vavae/planning/formulas.py what is computed"
    )
    return 0


def _cluster(arguments: argparse.Namespace) -> ClusterSpec:
    count, name = parse_gpus(arguments.gpus)
    options = ("price", "utilization", "node_gpus", "network_gbit", "store_gbit", "hours_between_failures")
    for option in (*options, "images", "image_bytes"):
        value = getattr(arguments, option)
        if value is not None and value <= 0:
            raise UserError(f"--{option.replace('_', '-')} {value:g}: give a number above 0")
    if arguments.utilization > 1:
        raise UserError(f"--utilization {arguments.utilization:g}: give a share, at most 1")
    return ClusterSpec(
        name,
        count,
        arguments.node_gpus,
        arguments.price,
        arguments.utilization,
        arguments.network_gbit * 1e9 / 8,
        arguments.store_gbit * 1e9 / 8,
        arguments.hours_between_failures,
    )


def _settings(config: "RunConfig", cluster: ClusterSpec) -> list[str]:
    """Overrides with which a run uses the whole cluster."""
    lanes = [f"stream.lanes={cluster.count}"] if config.stream.lanes < cluster.count else []
    actors = int(cluster.count / config.latents.gpus)
    workers = [f"workers.count={cluster.count}", "workers.use_gpu=true"]
    return [*lanes, *workers, f"latents.actors={actors}", f"sample.actors={cluster.count}"]
