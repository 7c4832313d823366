"""Progress of a run, from its storage alone: without its cluster, its images or its processes."""

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from vavae.progress import NAME_WIDTH, Progress, clock
from vavae.report.run_facts import hardware_of, training_cost
from vavae.runs.jobs import JOBS, TRAININGS, Job
from vavae.runs.run import Plan, Run
from vavae.storage.artifact import RECORD, read
from vavae.training.logging.log import latest_row, read_rows


class TrainingStatus(NamedTuple):
    """Progress of a training."""

    seen: int
    """Images at the newest checkpoint."""
    budget: int
    saved_at: datetime | None
    """Time at which it was written, where the store tells it."""
    rate: float | None
    """Images per second of late."""


class JobStatus(NamedTuple):
    """Progress of one job of a run."""

    job: Job
    plan: Plan
    training: TrainingStatus | None
    """Progress of a training that has begun; None for other jobs."""
    shards: int
    """Shards that the job has written so far; 0 for trainings."""

    @property
    def next_words(self) -> str:
        """The job with how far its training is, such as `train_vavae 6,400/19,200 images`."""
        training = self.training
        return self.job if training is None else f"{self.job} {training.seen:,}/{training.budget:,} images"

    def line(self, now: datetime) -> str:
        """Line such as `train_vavae  6,400/19,200 images  61 images/s  3:29 left  saved 0:12 ago`, or done and why."""
        training = self.training
        if self.plan.done or training is None:
            so_far = f"  shards so far: {self.shards:,}" if self.shards and not self.plan.done else ""
            return f"{self.job:<{NAME_WIDTH}} {'done' if self.plan.done else 'to do':<6} {self.plan.why}{so_far}"
        progress = Progress(self.job, training.seen, training.budget, rate=training.rate).line()
        saved = f"  saved {clock((now - training.saved_at).total_seconds())} ago" if training.saved_at else ""
        return progress + saved


def run_status(run: Run, plans: Mapping[Job, Plan]) -> list[JobStatus]:
    """Progress of every job.

    Args:
        run: begun or done.
        plans: what each job has to do.
    """
    return [JobStatus(job, plan, _training_status(run, job), _shards(run, job)) for job, plan in plans.items()]


def run_cost(run: Run, hourly_price: float) -> float:
    """Cost of the trainings so far.

    Args:
        run: begun or done.
        hourly_price: what a worker costs in an hour.
    """
    return sum(
        training_cost(read_rows(run.training_folder(job).child("log")), hardware.workers, hourly_price)
        for job in TRAININGS
        if _has_inputs(run, job) and (hardware := hardware_of(run.training_folder(job))) is not None
    )


def _training_status(run: Run, job: Job) -> TrainingStatus | None:
    budget = run.budget(job)
    if budget is None or not _has_inputs(run, job):
        return None
    checkpoints = run.storage.child(f"{run.training_prefix(job)}/checkpoints")
    committed = [path for path in checkpoints.sizes() if path.endswith(f"/{RECORD}")]
    record = read(checkpoints, committed[-1].removesuffix(f"/{RECORD}")) if committed else None
    if record is None or record.images_seen is None:
        return None
    rate = latest_row(run.training_folder(job).child("log")).get("images_per_second")
    return TrainingStatus(record.images_seen, budget, checkpoints.modified(committed[-1]), rate)


def _has_inputs(run: Run, job: Job) -> bool:
    return all(run.artifact(name) is not None for name in JOBS[job].inputs)


def _shards(run: Run, job: Job) -> int:
    if job in TRAININGS or not _has_inputs(run, job):
        return 0
    return sum(path.endswith(".tar") for path in run.storage.sizes(run.prefix(job)))
