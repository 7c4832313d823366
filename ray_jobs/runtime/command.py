"""The command line of every job: dry run, plan, preflight, and running what is missing."""

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import ray
from rich import filesize
from rich.console import Console
from rich.table import Table

from ray_jobs.runtime.cluster import check_cluster, check_ray, cluster
from ray_jobs.runtime.progress_monitor import log_job_events
from ray_jobs.runtime.resources import Resources
from ray_jobs.runtime.sources import check_sources, missing_sources
from vavae.command import parse_arguments, run_command
from vavae.config.load import dump, load
from vavae.config.paths import written_path
from vavae.config.size import describe_size
from vavae.data.shards.manifest import read_manifest
from vavae.errors import UserError
from vavae.progress import clock
from vavae.runs.commit import commit_of_code
from vavae.runs.config import RunConfig
from vavae.runs.events import Event, EventLog
from vavae.runs.files import CONFIG, REPORT
from vavae.runs.jobs import JOBS, Job
from vavae.runs.run import Plan, Run
from vavae.runs.training_config import TrainingConfig
from vavae.storage.retry import StorageUnavailableError

JobFunction = Callable[[Run], None]
"""Runs one job, with Ray running."""


def main(job: Job, description: str, function: JobFunction, argv: Sequence[str] | None = None) -> int:
    """Run the command line of one job; returns its exit status.

    Args:
        job: name of the job.
        description: help text.
        function: runs the job.
        argv: arguments; None takes `sys.argv`.
    """
    return run_command(lambda: _main(job, description, lambda run: {job: run.plan(job)}, {job: function}, argv))


def pipeline(description: str, functions: Mapping[Job, JobFunction], argv: Sequence[str] | None = None) -> int:
    """Run the command line of all jobs in a row; returns its exit status."""
    return run_command(lambda: _main("pipeline", description, Run.plans, functions, argv))


def _main(
    name: str,
    description: str,
    plan: Callable[[Run], dict[Job, Plan]],
    functions: Mapping[Job, JobFunction],
    argv: Sequence[str] | None,
) -> int:
    arguments = parse_arguments(f"python -m ray_jobs.{name}", description, argv)
    config = load(RunConfig, arguments.config, arguments.overrides)
    if arguments.print_config:
        print(dump(config), end="")
        return 0
    run = Run(config)
    if arguments.dry_run:
        _dry_run(run, plan, functions)
        return 0
    now = run.snapshot()
    try:
        plans = plan(now)
    except StorageUnavailableError as error:
        raise UserError(
            f"storage.root={written_path(config.storage.root)}: {error}; check it and storage.endpoint"
        ) from error
    to_do = [job for job, found in plans.items() if not found.done]
    if to_do:
        check_ray()
        if "prepare_shards" in to_do:
            check_sources(config.shards, run.storage)
        from ray_jobs.runtime.preflight import preflight  # slow, and of no use where everything is done

        missing = preflight(now, to_do)
        if missing:
            raise UserError(missing[0])
        _print_plan(now, plans)
        run.storage.write_bytes(CONFIG, dump(config).encode())
        events = EventLog(run.storage)
        commit = commit_of_code()
        code = {} if commit is None else {"commit": commit}
        events.add(Event("started", details={"jobs": to_do, "workers": config.workers.count, **code}))
        with cluster(config, evaluation=Resources.for_checkpoint_evaluation(config)):
            for job in to_do:
                _run_job(run, job, functions[job], events)
        events.add(Event("done"))
    for job, found in plans.items():
        if found.done:
            print(f"{job:<18} done  {found.why}")
    print(f"the run is in {run.storage.url()}")
    if run.storage.is_file(REPORT):
        print(f"report: {run.storage.url(REPORT)}")
        if not run.storage.is_local:
            print(f"to look at it: vavae report {run.storage.url()}")
    return 0


def _dry_run(run: Run, plan: Callable[[Run], dict[Job, Plan]], jobs: Collection[Job]) -> None:
    """Print the plan, and what has to be fetched before it can be carried out; refuse a cluster that is too small."""
    run = run.snapshot()
    missing = missing_sources(run.config.shards, run.storage) if "prepare_shards" in jobs else []
    plans = _plans_without_images(jobs) if missing else plan(run)
    to_do = [job for job, found in plans.items() if not found.done]
    if to_do:
        from ray_jobs.runtime.preflight import preflight  # slow, likewise

        missing += preflight(run, to_do)
    _print_plan(run, plans)
    for line in missing:
        print(f"still needed: {line}")
    check_cluster(run.config, Resources.for_checkpoint_evaluation(run.config))


def _plans_without_images(jobs: Iterable[Job]) -> dict[Job, Plan]:
    """Plans where everything is to do: whether artifacts belong to images that are not here can't be told."""
    first = JOBS["prepare_shards"]
    why = {first.job: "its images are not here"}
    return {job: Plan(False, why.get(job, f"after {first.makes}")) for job in jobs}


def _run_job(run: Run, job: Job, function: JobFunction, events: EventLog) -> None:
    """Run one job, unless the jobs before it have left its artifact up to date."""
    found = run.plan(job)
    if found.done:
        print(f"{job:<18} done  {found.why}", flush=True)
        return
    start = time.monotonic()
    try:
        with log_job_events(events, job), unwrap_worker_errors():
            function(run)
    except StorageUnavailableError as error:
        raise UserError(f"{job}: {error}; the same command resumes from what is there") from error
    digest = run.require(job).digest[:12]
    print(f"{job:<18} made  {digest}  in {clock(time.monotonic() - start)}", flush=True)


@contextmanager
def unwrap_worker_errors() -> Iterator[None]:
    """Raise an error of a pooled worker that takes one line as if it had occurred in the block."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | OSError):
            raise error.cause from None
        raise


def _print_plan(run: Run, plans: dict[Job, Plan]) -> None:
    """Print the jobs, their artifacts, and the effort and bytes of each."""
    table = Table(title=f"run {run.config.name} in {run.storage.url()}", title_justify="left")
    for column in ("job", "makes", "state", "work", "bytes"):
        table.add_column(column)
    shards = run.artifact("prepare_shards")
    manifest = None if shards is None else read_manifest(run.folder("prepare_shards"))
    for job, found in plans.items():
        state = f"done {found.why}" if found.done else f"to do: {found.why}"
        if found.done:
            size = filesize.decimal(sum(file.bytes for file in run.require(job).files.values()))
        else:
            from vavae.planning.sizes import bytes_to_write  # slow, likewise

            estimate = bytes_to_write(run.config, job, manifest)
            size = "" if estimate is None else f"≤ {filesize.decimal(estimate)}"
        table.add_row(job, JOBS[job].makes, state, _effort(run.config, job), size)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110)
    console.print(table)


def _effort(config: RunConfig, job: Job) -> str:
    """Images, steps and workers of a job, in words."""
    training = getattr(config, job, None)
    if isinstance(training, TrainingConfig):
        steps, batch_size = training.steps, training.batch_size
        workers = "1 worker" if config.workers.count == 1 else f"{config.workers.count} workers"
        return f"{steps * batch_size:,} images, {steps:,} steps of {batch_size}, {workers}"
    moments = "mean and std" if config.tokenizer.kind == "kl" else "points"
    return {
        "prepare_shards": f"{written_path(config.shards.source)} at {describe_size(config.shards.image_size)} px",
        "precompute_latents": f"{' x '.join(map(str, config.latent_shape))} float16 {moments}",
        "sample": f"{config.sample.images:,} images, {config.solver.summary}",
        "evaluate": f"up to {config.evaluate.images:,} held-out images",
    }[job]
