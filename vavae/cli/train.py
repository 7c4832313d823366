"""``vavae train``: one training in this process, or under torchrun in several."""

import argparse
from dataclasses import replace
from typing import Any

from vavae.cli.arguments import add_config
from vavae.runs.jobs import Job

_JOBS: dict[str, Job] = {"vavae": "train_vavae", "lightningdit": "train_lightningdit"}
"""The training of each model."""


def add_commands(commands: Any) -> None:
    """Add ``vavae train``; ``act`` of its arguments returns the exit status."""
    train = commands.add_parser("train", help="train one model in this process, or under torchrun in several")
    train.add_argument("model", choices=list(_JOBS))
    add_config(train)
    train.set_defaults(act=_train)


def _train(arguments: argparse.Namespace) -> int:
    # torch and DeepSpeed take seconds to import.
    from vavae.config.load import load
    from vavae.distributed.torch_settings import configure_torch
    from vavae.distributed.world import World, process_group
    from vavae.evaluation.checkpoints import evaluate_pending_checkpoints
    from vavae.planning.training import resolve_lanes_at_once
    from vavae.runs.config import RunConfig
    from vavae.runs.evaluation_inputs import CheckpointEvaluationInputs
    from vavae.runs.events import EventLog
    from vavae.runs.run import Run
    from vavae.runs.training_inputs import begin_training
    from vavae.tracking.trackers import check_trackers
    from vavae.training.session import StoppableSession, stop_on_signals
    from vavae.training.train import train

    run = Run(load(RunConfig, arguments.config, arguments.overrides))
    check_trackers(run.config.tracking)
    configure_torch(run.config.workers)
    job, session = _JOBS[arguments.model], StoppableSession(EventLog(run.storage))
    with process_group(run.config.workers.use_gpu, run.config.collective_seconds(job)):
        world = World.current(run.config.workers.use_gpu)
        if world.is_first:
            run.storage.warn_of_slow_cache()
        with stop_on_signals(session.request_stop):
            inputs = begin_training(run, job, world)
            train(replace(inputs, config=resolve_lanes_at_once(inputs.config, world)), session, world)
    if world.is_first and run.plan(job).done and job == "train_lightningdit":
        evaluate_pending_checkpoints(CheckpointEvaluationInputs.of(run))
    if session.stop_requested() and not run.plan(job).done:
        raise KeyboardInterrupt
    return 0
