"""Ray Train around the training loop: workers, restarts, and the errors that come back."""

import os
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from ray_jobs.runtime.progress_actor import Board, stopped_by_signals
from ray_jobs.runtime.progress_monitor import watched
from ray_jobs.runtime.session import RaySession
from vavae.distributed.torch_settings import configure_torch
from vavae.distributed.world import World
from vavae.errors import CommonError, UserError
from vavae.runs.run import Job, Run
from vavae.runs.training_inputs import begin_training
from vavae.storage.retry import StorageUnavailableError
from vavae.training.checkpoints.lease import SupersededError
from vavae.training.session import this_process
from vavae.training.train import train

_STALE_SECONDS = "20"
"""How old Ray's view of the cluster may be, by which it sizes elastic workers; it would wait a minute for lost ones."""


def fit(run: Run, job: Job) -> None:
    """Train one model on the workers that the configuration asks for, until its export is committed.

    Raises:
        UserError: the configuration or the artifacts don't allow it.
        KeyboardInterrupt: the run was asked to stop; its checkpoint is there to go on from.
    """
    workers, board = run.config.workers, Board()
    if workers.min_count is not None:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _STALE_SECONDS)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"run": run, "job": job, "board": board, "owner": this_process()},
        torch_config=TorchConfig(backend="nccl" if workers.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count if workers.min_count is None else (workers.min_count, workers.count),
            use_gpu=workers.use_gpu,
            resources_per_worker=_resources(run),
            elastic_resize_monitor_interval_s=workers.resize_seconds,
        ),
        run_config=RunConfig(
            name=f"{run.config.name}-{job}",
            storage_path=_ray_folder(run),
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
    )
    # In the main thread Ray Train would answer an interrupt itself, by ending the workers where they are.
    with watched(run, job, board), stopped_by_signals(board), ThreadPool(1) as thread:
        try:
            thread.apply(trainer.fit)
        except TrainingFailedError:
            error = board.error() or board.outage()
            if error is not None:
                raise UserError(error) from None
            raise
    error = board.error()
    if error is not None:
        raise UserError(error)
    if not run.plan(job).done:
        raise KeyboardInterrupt


def _ray_folder(run: Run) -> str:
    """Where Ray may leave a mark; a local folder, for its own clients of stores know none of our options."""
    storage = run.storage
    return storage.url("ray") if storage.is_local else str(Path(storage.cache).expanduser() / "ray")


def _resources(run: Run) -> dict[str, float]:
    workers = run.config.workers
    return {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.use_gpu else {})}


def _worker(settings: dict[str, Any]) -> None:
    """One rank of the training; Ray Train calls it in every worker."""
    run: Run = settings["run"]
    job: Job = settings["job"]
    board: Board = settings["board"]
    if board.error() is not None:
        return  # restarted after an error that a restart can't mend
    configure_torch(run.config.workers)
    owner: str = settings["owner"]
    try:
        session, world = RaySession(run, job, board, owner), World.current(run.config.workers.use_gpu)
        train(begin_training(run, job, world), session, world)
    except CommonError as error:
        # All workers end with it, so there is no need for the error that lets Ray end, and then start, the others.
        if not (isinstance(error, SupersededError) and error.owner == owner):
            board.fail(str(error))
    except UserError as error:
        board.fail(str(error))
        raise
    except StorageUnavailableError as error:
        board.lament(f"{job}: {error}; the same command goes on from the last checkpoint")
        raise
