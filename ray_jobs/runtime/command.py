"""What all jobs have in common: the command line, the dry run, and finding out that there is nothing to do."""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import ray
from rich import filesize
from rich.console import Console
from rich.table import Table

from ray_jobs.runtime.actor_pool import Share
from ray_jobs.runtime.cluster import check_cluster, cluster
from ray_jobs.runtime.preflight import check_sources, missing_sources, preflight
from ray_jobs.runtime.progress_monitor import told
from vavae.config.command import parse_arguments, run_command
from vavae.config.load import dump, load
from vavae.config.paths import written_path
from vavae.errors import UserError
from vavae.planning.estimate import bytes_to_write
from vavae.progress import clock
from vavae.runs.config import RunConfig
from vavae.runs.events import Event, EventLog
from vavae.runs.files import CONFIG, REPORT
from vavae.runs.run import JOBS, Job, Plan, Run
from vavae.storage.retry import StorageUnavailableError

Work = Callable[[Run], None]


def main(job: Job, description: str, work: Work, argv: Sequence[str] | None = None) -> int:
    """The command line of one job; returns its exit status.

    Args:
        job: its name.
        description: its help text.
        work: does it, with Ray running.
        argv: the arguments, `sys.argv` by default.
    """
    return run_command(lambda: _main(job, description, lambda run: {job: run.plan(job)}, {job: work}, argv))


def pipeline(description: str, works: Mapping[Job, Work], argv: Sequence[str] | None = None) -> int:
    """The command line of all jobs in a row; returns its exit status."""
    return run_command(lambda: _main("pipeline", description, Run.plans, works, argv))


def _main(
    name: str,
    description: str,
    plan: Callable[[Run], dict[Job, Plan]],
    works: Mapping[Job, Work],
    argv: Sequence[str] | None,
) -> int:
    arguments = parse_arguments(f"python -m ray_jobs.{name}", description, argv)
    config = load(RunConfig, arguments.config, arguments.overrides)
    if arguments.print_config:
        print(dump(config), end="")
        return 0
    run = Run(config)
    if arguments.dry_run:
        _dry_run(run, plan, works)
        return 0
    try:
        plans = plan(run)
    except StorageUnavailableError as error:
        raise UserError(
            f"storage.root={written_path(config.storage.root)}: {error}; check it and storage.endpoint"
        ) from error
    to_do = [job for job, found in plans.items() if not found.done]
    if to_do:
        if "prepare_shards" in to_do:
            check_sources(run)
        missing = preflight(run, to_do)
        if missing:
            raise UserError(missing[0])
        _print_plan(run, plans)
        run.storage.write_bytes(CONFIG, dump(config).encode())
        events = EventLog(run.storage)
        events.add(Event("started", details={"jobs": to_do, "workers": config.workers.count}))
        with cluster(config, beside=Share.beside(run)):
            for job in to_do:
                _do(run, job, works[job], events)
        events.add(Event("done"))
    for job, found in plans.items():
        if found.done:
            print(f"{job:<18} done  {found.why}")
    print(f"the run is in {run.storage.url()}")
    if run.storage.is_file(REPORT):
        print(f"report: {run.storage.url(REPORT)}")
    return 0


def _dry_run(run: Run, plan: Callable[[Run], dict[Job, Plan]], works: Mapping[Job, Work]) -> None:
    """Print the plan, and what has to be fetched before it can be carried out; refuse a cluster that is too small."""
    missing = missing_sources(run) if "prepare_shards" in works else []
    plans = _plans_without_images(works) if missing else plan(run)
    missing += preflight(run, [job for job, found in plans.items() if not found.done])
    _print_plan(run, plans)
    for line in missing:
        print(f"still needed: {line}")
    check_cluster(run.config, Share.beside(run))


def _plans_without_images(jobs: Iterable[Job]) -> dict[Job, Plan]:
    """All is to do: what there may be can't be told to be made from images that are not here."""
    first = JOBS["prepare_shards"]
    why = {first.job: "its images are not here"}
    return {job: Plan(False, why.get(job, f"after {first.makes}")) for job in jobs}


def _do(run: Run, job: Job, work: Work, events: EventLog) -> None:
    """Do one job, unless the jobs before it have turned out to leave its artifact as it was."""
    found = run.plan(job)
    if found.done:
        print(f"{job:<18} done  {found.why}", flush=True)
        return
    start = time.monotonic()
    try:
        with told(events, job):
            _in_one_line(work, run)
    except StorageUnavailableError as error:
        raise UserError(f"{job}: {error}; the same command goes on from what is there") from error
    digest = run.require(job).digest[:12]
    print(f"{job:<18} made  {digest}  in {clock(time.monotonic() - start)}", flush=True)


def _in_one_line(work: Work, run: Run) -> None:
    """Do some work; what a pooled worker met is raised as if it had been met here, where it has a line of its own."""
    try:
        work(run)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | StorageUnavailableError):
            raise error.cause from None
        raise


def _print_plan(run: Run, plans: dict[Job, Plan]) -> None:
    """The stages, their artifacts, and what each would take."""
    table = Table(title=f"run {run.config.name} in {run.storage.url()}", title_justify="left")
    for column in ("job", "makes", "state", "work", "bytes"):
        table.add_column(column)
    for job, found in plans.items():
        state = f"done {found.why}" if found.done else f"to do: {found.why}"
        table.add_row(job, JOBS[job].makes, state, _effort(run, job), _bytes(run, job, found))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110)
    console.print(table)


def _bytes(run: Run, job: Job, plan: Plan) -> str:
    """What an artifact takes in storage, or will take at most."""
    if plan.done:
        return filesize.decimal(sum(file.bytes for file in run.require(job).files.values()))
    estimate = bytes_to_write(run, job)
    return "" if estimate is None else f"≤ {filesize.decimal(estimate)}"


def _effort(run: Run, job: Job) -> str:
    """Images, steps and workers of a job, in words."""
    config = run.config
    budget = run.budget(job)
    if budget is not None:
        section = getattr(config, job)
        return f"{budget:,} images, {section.steps:,} steps of {section.batch_size}, {config.workers.count} workers"
    return {
        "prepare_shards": f"{written_path(config.shards.source)} at {config.shards.image_size} px",
        "precompute_latents": f"{config.tokenizer.latent_dim} x {config.grid} x {config.grid} float16 mean and std",
        "sample": f"{config.sample.images:,} images, {config.solver.summary}",
        "evaluate": f"up to {config.evaluate.images:,} held-out images",
    }[job]
