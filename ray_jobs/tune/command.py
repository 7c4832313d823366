"""The command line of a sweep: its plan, its trials under Ray Tune, and its results."""

import os
import sys
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ray_jobs.runtime.cluster import check_ray, cluster
from ray_jobs.runtime.preflight import preflight
from ray_jobs.runtime.sources import check_sources
from ray_jobs.tune import search
from ray_jobs.tune.callbacks import tune_callbacks
from ray_jobs.tune.shared_tasks import SharedTasks, TaskFunctions
from vavae.command import parse_arguments, run_command
from vavae.config.yaml_source import to_text
from vavae.errors import UserError
from vavae.runs.config import RunConfig
from vavae.runs.jobs import JOBS
from vavae.runs.run import Run
from vavae.sweep.results import FRONTIER, write_sweep
from vavae.sweep.rows import new_rows, restore_rows, write_rows
from vavae.sweep.sharing import Sharing
from vavae.sweep.sweep import Sweep, as_written, describe, name_of_trial
from vavae.sweep.trial import Entry, read_ledger

# Tune would refuse what a trial reports as long as an objective is not in it.
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
# It would print settings of its own, and where its driver keeps TensorBoard's files for a moment.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# And a traceback for each failure, beside the line that says why.
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")


def main(functions: TaskFunctions, argv: Sequence[str] | None = None) -> int:
    """Run the command line of a sweep; returns its exit status.

    Args:
        functions: run the tasks of its trials.
        argv: arguments; None takes `sys.argv`.
    """
    return run_command(lambda: _main(functions, argv))


def _main(functions: TaskFunctions, argv: Sequence[str] | None) -> int:
    arguments = parse_arguments("python -m ray_jobs.tune_vf", "Search configurations for the frontier.", argv)
    sweep = Sweep.load(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(to_text(as_written(sweep)), end="")
        return 0
    run, sharing = sweep.runs(sweep.space.examples()[0])[0], Sharing.of(sweep)
    missing = _missing(sweep, run.config)
    if arguments.dry_run:
        _print_plan(sweep, run.config, sharing)
        for line in missing:
            print(f"still needed: {line}")
        return 0
    restore_rows(sweep)
    points = search.points_to_run(sweep)
    if points or sweep.config.search.method == "optuna":
        if sharing.run(run.config, "prepare_shards").artifact("prepare_shards") is None:
            check_sources(run.config.shards, run.storage)
        if missing:
            raise UserError(missing[0])
        callbacks = tune_callbacks(sweep)
        check_ray()
        sweep.storage.write_bytes("sweep.yaml", to_text(as_written(sweep)).encode())
        peak = search.peak_resources(run.config)
        with cluster(run.config, cpus=peak.cpus * (sweep.config.max_concurrent or 1)):
            concurrent = search.concurrent_trials(sweep, peak)
            shared_tasks = SharedTasks.start(sharing, functions)
            with shared_tasks.show_progress():
                search.tuner(sweep, shared_tasks, points, concurrent, callbacks).fit()
    return _finish(sweep)


def _finish(sweep: Sweep) -> int:
    """Write the results and print where they are; returns 1 where trials failed."""
    write_sweep(sweep)
    write_rows(sweep)
    known = {name_of_trial(point) for point in sweep.points()}
    states = Counter(entry.state for name, entry in read_ledger(sweep).items() if name in known or not known)
    print(f"trials: {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}")
    print(f"frontier: {sweep.storage.url(FRONTIER)}")
    if states["running"]:
        raise KeyboardInterrupt  # the same command resumes them
    return 1 if states["failed"] else 0


def _missing(sweep: Sweep, config: RunConfig) -> list[str]:
    """List what has to be fetched before every point can run; all are checked in the folder of one trial's run."""
    at_home = {"name": config.name, "storage": config.storage}
    runs = [Run(sweep.full_config(point).model_copy(update=at_home)) for point in sweep.space.examples()]
    return list(dict.fromkeys(line for run in runs for line in preflight(run, list(JOBS))))


def _print_plan(sweep: Sweep, config: RunConfig, sharing: Sharing) -> None:
    """Print the points, what their trials share, and the resources of a trial."""
    ledger, rows = read_ledger(sweep), new_rows(sweep)
    table = Table(title=f"sweep {sweep.config.name} in {sweep.storage.url()}", title_justify="left")
    for column in ("trial", "state", "sets"):
        table.add_column(column)
    points = sweep.points() or [entry.point for entry in ledger.values()]
    for point in points:
        name = name_of_trial(point)
        entry = Entry(point, "finished") if name in rows else ledger.get(name)
        table.add_row(name, entry.state if entry else "to do", describe(point))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 150).print(table)
    runs = [run for point in points if sweep.refusal(point) is None for run in sweep.runs(point)]
    for job in sharing.jobs:
        made = {sharing.run(run.config, job).config.name for run in runs}
        print(f"{JOBS[job].makes}: made {len(made)} times for {len(runs)} runs")
    prefixes = [prefix for run in runs if (prefix := sharing.prefix(run.config)) is not None]
    if prefixes:
        made = {sharing.run(prefix, "train_vavae").config.name for prefix in prefixes}
        print(f"tokenizer up to the phase that varies: made {len(made)} times")
    peak = search.peak_resources(config)
    print(f"a trial takes up to {peak.cpus:g} CPUs and {peak.gpus:g} GPUs at once")
