"""Ray Train around the training loop: workers, restarts, and the errors that come back."""

import logging
import math
import os
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from typing import Any

from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution import context as ray_train_context
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from ray_jobs.runtime.progress_actor import ProgressActor
from ray_jobs.runtime.progress_monitor import monitor_progress
from ray_jobs.runtime.session import RaySession
from vavae.distributed.torch_settings import configure_torch
from vavae.distributed.world import World
from vavae.errors import CommonError, UserError, one_line
from vavae.planning.training import resolve_lanes_at_once
from vavae.runs.jobs import Job
from vavae.runs.run import Run
from vavae.runs.training_inputs import begin_training
from vavae.training.checkpoints.lease import SupersededError
from vavae.training.session import stop_on_signals, this_process
from vavae.training.train import train

_STALE_SECONDS = "20"
"""Age up to which Ray's view of the cluster sizes elastic workers; by default it waits a minute for lost ones."""


def fit(run: Run, job: Job) -> None:
    """Train one model on the configured workers until its export is committed.

    Args:
        run: the run of the training.
        job: the training.

    Raises:
        UserError: the configuration or the artifacts don't allow it.
        KeyboardInterrupt: the run was asked to stop, and has saved a checkpoint to resume from.
    """
    workers, storage, progress = run.config.workers, run.storage, ProgressActor()
    if workers.min_count is not None:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _STALE_SECONDS)
    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config={"run": run, "job": job, "progress": progress, "owner": this_process()},
        torch_config=TorchConfig(
            backend="nccl" if workers.use_gpu else "gloo", timeout_s=math.ceil(run.config.collective_seconds(job))
        ),
        scaling_config=ScalingConfig(
            num_workers=workers.count if workers.min_count is None else (workers.min_count, workers.count),
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.use_gpu else {})},
            elastic_resize_monitor_interval_s=workers.resize_seconds,
        ),
        run_config=RunConfig(  # type: ignore[arg-type]  # the types are those of the version before
            name=f"{run.config.name}-{job}",
            # Local, for Ray's own clients of object stores know none of our options.
            storage_path=storage.url("ray") if storage.is_local else str(storage.cache_folder / "ray"),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    # In the main thread Ray Train would answer an interrupt itself, by ending the workers where they are.
    with monitor_progress(run, job, progress), stop_on_signals(progress.request_stop), ThreadPool(1) as thread:
        try:
            thread.apply(trainer.fit)
        except TrainingFailedError:
            error = progress.error() or progress.outage()
            if error is not None:
                raise UserError(error) from None
            raise
    error = progress.error()
    if error is not None:
        raise UserError(error)
    if not run.plan(job).done:
        raise KeyboardInterrupt


def _train_on_worker(settings: dict[str, Any]) -> None:
    """Train as one rank; Ray Train calls it in every worker."""
    run: Run = settings["run"]
    job: Job = settings["job"]
    progress: ProgressActor = settings["progress"]
    if progress.error() is not None:
        return  # restarted after an error that a restart can't mend
    # Ray names this logger by its file, out of reach of its own setting, and tells all metrics of every report.
    ray_train_context.logger.setLevel(logging.WARNING)
    configure_torch(run.config.workers)
    owner: str = settings["owner"]
    try:
        session, world = RaySession(run.config.name, job, progress, owner), World.current(run.config.workers.use_gpu)
        inputs = begin_training(run, job, world)
        train(replace(inputs, config=resolve_lanes_at_once(inputs.config, world)), session, world)
    except CommonError as error:
        # All ranks raise it, so none has to fail for Ray to stop the others, and then restart them.
        if not (isinstance(error, SupersededError) and error.owner == owner):
            progress.report_error(str(error))
    except UserError as error:
        progress.report_error(str(error))
        raise
    except OSError as error:
        progress.report_outage(f"{job}: {one_line(error)}; the same command resumes from the last checkpoint")
        raise
