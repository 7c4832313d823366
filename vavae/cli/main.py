"""The console command ``vavae``: what needs no cluster, and how to reach one."""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime, timezone

from ray_jobs.submission.command import add_commands as add_submission_commands
from vavae.cli.bench import add_commands as add_bench_commands
from vavae.cli.data import add_commands as add_data_commands
from vavae.cli.plan import add_arguments as add_plan_arguments
from vavae.config.command import run_command
from vavae.config.load import load
from vavae.errors import UserError
from vavae.runs.config import RunConfig
from vavae.runs.run import Job, Run

_MODELS: dict[str, Job] = {"vavae": "train_vavae", "lightningdit": "train_lightningdit"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        "vavae", description="VA-VAE and LightningDiT, here and on a cluster.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    status = commands.add_parser("status", help="say what a run has and what is still to do, from its storage alone")
    status.set_defaults(act=_status)
    status.add_argument(
        "--config", metavar="FILE", help="the YAML configuration of the run, in place of its folder: compares the two"
    )
    status.add_argument("--hourly-price", type=float, metavar="PRICE", help="what a worker costs in an hour")
    status.add_argument(
        "overrides", nargs="*", metavar="RUN | key.path=value", help="folder or URL of the run; set one key"
    )
    plan = commands.add_parser("plan", help="say what a run would take on a cluster: time, money, bytes, bottlenecks")
    add_plan_arguments(plan)
    train = commands.add_parser("train", help="train one model in this process, or under torchrun in several")
    train.add_argument("model", choices=list(_MODELS))
    train.set_defaults(act=_train)
    bring = commands.add_parser(
        "import", help="make released weights or latents a run's own, as if they had been made there"
    )
    bring.set_defaults(act=_exchange, verb="import", format="released")
    give = commands.add_parser("export", help="write weights or latents of a run as they are released")
    give.add_argument("--format", choices=("released", "diffusers"), default="released", help="default: %(default)s")
    give.set_defaults(act=_exchange, verb="export")
    for command in (bring, give):
        command.add_argument("what", choices=("tokenizer", "lightningdit", "latents"))
        command.add_argument("file", metavar="FILE", help="path or storage URL; a folder for latents and for diffusers")
    sample = commands.add_parser("sample", help="make images of given classes from a trained run")
    sample.add_argument("--run", required=True, metavar="FOLDER", help="path or URL of the folder of the run")
    sample.add_argument("--classes", required=True, metavar="LIST", help="names or numbers, such as 207,360")
    sample.add_argument(
        "--seeds",
        required=True,
        metavar="LIST",
        help="such as 0-9 or 0,3,8: every class with each; seed i gives the noise of image i of the run's samples",
    )
    sample.add_argument("--guidance", metavar="SCALE", help="short for guidance.scale=SCALE; default: the run's")
    sample.add_argument(
        "--out",
        default="samples.png",
        metavar="FILE",
        help="path or URL ending in .png (a class a row), .tar (WebDataset) or .npz (one array); default: %(default)s",
    )
    sample.set_defaults(act=_sample)
    report = commands.add_parser("report", help="make the report of a run again, or put runs side by side")
    report.add_argument("runs", nargs="+", metavar="RUN", help="folder or URL of a run, or its YAML configuration")
    report.add_argument("--out", default="report.html", metavar="FILE", help="default: %(default)s")
    report.add_argument("--hourly-price", type=float, metavar="PRICE", help="what a worker costs in an hour")
    report.set_defaults(act=_report)
    add_submission_commands(commands)
    data = commands.add_parser("data", help="index, verify and describe shards of images")
    add_data_commands(data)
    bench = commands.add_parser("bench", help="measure parts of this machine's pipeline")
    add_bench_commands(bench)
    for command in (report, data, bench):
        command.set_defaults(overrides=None)
    for command in (plan, train, bring, give):
        command.add_argument("--config", required=True, metavar="FILE", help="the YAML configuration of the run")
    for command in (plan, train, bring, give, sample):
        command.add_argument("overrides", nargs="*", metavar="key.path=value", help="set one key, value in YAML")
    # argparse closes the list of overrides at the first option; those that stand after one are left over.
    arguments, overrides = parser.parse_known_args(argv)
    if any(override.startswith("-") for override in overrides) or (overrides and arguments.overrides is None):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    if overrides:
        arguments.overrides += overrides
    return run_command(lambda: arguments.act(arguments))


def _status(arguments: argparse.Namespace) -> int:
    from vavae.cli.status import run_cost, run_status

    if arguments.config is not None:
        run = Run(load(RunConfig, arguments.config, arguments.overrides))
    elif arguments.overrides:
        run = Run.at(arguments.overrides[0], arguments.overrides[1:])
    else:
        raise UserError("name the run: the folder storage.root/name, or --config FILE")
    for stage in run_status(run, run.plans(sources=arguments.config is not None)):
        print(stage.line(datetime.now(timezone.utc)))
    price = run.config.workers.hourly_price if arguments.hourly_price is None else arguments.hourly_price
    if price is not None:
        print(f"cost so far: {run_cost(run, price):,.2f} at {price:g} per worker and hour")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    # torch and DeepSpeed take seconds to import, and `status` needs neither.
    from vavae.distributed.torch_settings import configure_torch
    from vavae.distributed.world import World, process_group
    from vavae.evaluation.checkpoints import evaluate_pending_checkpoints
    from vavae.runs.evaluation_inputs import CheckpointEvaluationInputs
    from vavae.runs.events import EventLog
    from vavae.runs.training_inputs import begin_training
    from vavae.training.session import SignaledSession
    from vavae.training.train import train

    run = Run(load(RunConfig, arguments.config, arguments.overrides))
    configure_torch(run.config.workers)
    with process_group(run.config.workers.use_gpu):
        job, session = _MODELS[arguments.model], SignaledSession(EventLog(run.storage))
        world = World.current(run.config.workers.use_gpu)
        with session.handle_signals():
            train(begin_training(run, job, world), session, world)
    if world.is_first and run.plan(job).done and job == "train_lightningdit":
        evaluate_pending_checkpoints(CheckpointEvaluationInputs.of(run))
    if session.stop_requested() and not run.plan(job).done:
        raise KeyboardInterrupt
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from vavae.cli.sample import sample
    from vavae.runs.sampling_inputs import SamplingInputs

    guidance = [] if arguments.guidance is None else [f"guidance.scale={arguments.guidance}"]
    inputs = SamplingInputs.at(arguments.run, [*arguments.overrides, *guidance])
    sample(inputs, arguments.classes, arguments.seeds, arguments.out)
    return 0


def _exchange(arguments: argparse.Namespace) -> int:
    from vavae.interop import import_export as exchange

    run, file = Run(load(RunConfig, arguments.config, arguments.overrides)), arguments.file
    match (arguments.verb, arguments.what, arguments.format):
        case ("import", "tokenizer", "released"):
            exchange.import_tokenizer(run.config, run.import_output("train_vavae"), file)
        case ("import", "lightningdit", "released"):
            output = run.import_output("train_lightningdit")
            exchange.import_lightningdit(run.config, run.folder("precompute_latents"), output, file)
        case ("import", "latents", "released"):
            output = run.import_output("precompute_latents")
            exchange.import_latents(run.config, run.folder("prepare_shards"), output, file)
        case ("export", "tokenizer", "released"):
            exchange.export_tokenizer(run.stored("train_vavae"), file)
        case ("export", "tokenizer", "diffusers"):
            exchange.export_diffusers_tokenizer(run.stored("train_vavae"), run.config.shards.image_size, file)
        case ("export", "lightningdit", "released"):
            exchange.export_lightningdit(run.stored("train_lightningdit"), file)
        case ("export", "latents", "released"):
            exchange.export_latents(run.stored("precompute_latents"), run.storage.at(file), run.config.seed)
        case _:
            raise UserError(f"--format {arguments.format}: only the tokenizer can be written in that format")
    print(f"{arguments.verb}ed the {arguments.what} of {run.storage.url()}: {arguments.file}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from vavae.cli.report import write_report

    return write_report(arguments)


if __name__ == "__main__":
    sys.exit(main())
