"""A sweep of whole runs, up to the frontier: ``python -m ray_jobs.tune_vf --config configs/sweeps/FILE``."""

import os
import sys
from collections import Counter
from collections.abc import Sequence

from ray import tune
from rich.console import Console
from rich.table import Table

from ray_jobs.pipeline import WORKS
from ray_jobs.runtime.actor_pool import Advance, Work, work_through
from ray_jobs.runtime.cluster import cluster
from ray_jobs.runtime.preflight import check_sources, preflight
from ray_jobs.tune import search as _trials
from ray_jobs.tune.callbacks import callbacks
from ray_jobs.tune.shared_tasks import Works, Workshop
from vavae.config.command import parse_arguments, run_command
from vavae.config.yaml_source import to_text
from vavae.errors import UserError
from vavae.evaluation import evaluate as evaluation
from vavae.runs.evaluation_inputs import EvaluationInputs
from vavae.runs.run import JOBS, Run
from vavae.sweep.results import FRONTIER, write_sweep
from vavae.sweep.sharing import SHARED_JOBS, Sharing
from vavae.sweep.space import Point
from vavae.sweep.sweep import Sweep, as_written, describe, name_of_trial
from vavae.sweep.trial import read_ledger, write_signals

# Tune would refuse what a trial reports as long as an objective is not in it.
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
# It would print settings of its own, and where its driver keeps TensorBoard's files for a moment.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")


def measure_tokenizer(run: Run) -> None:
    """Measure a tokenizer by itself, in one actor."""
    work_through(run, "evaluate", _make_signals, [run], run.config.evaluate.images, actors=1)


def _make_signals(run: Run) -> Work:
    def do(item: Run, advance: Advance) -> None:
        metrics = evaluation.evaluate_tokenizer(EvaluationInputs.of(item), advance)
        write_signals(item, {metric.name: metric.value for metric in metrics})

    return do


TASKS: Works = {**{job: WORKS[job] for job in JOBS}, "measure_tokenizer": measure_tokenizer}


def main(argv: Sequence[str] | None = None, works: Works = TASKS) -> int:
    """The command line; returns the exit status."""
    return run_command(lambda: _main(argv, works))


def _main(argv: Sequence[str] | None, works: Works) -> int:
    arguments = parse_arguments("python -m ray_jobs.tune_vf", "Search configurations for the frontier.", argv)
    sweep = Sweep.load(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(to_text(as_written(sweep)), end="")
        return 0
    run, sharing = sweep.runs(sweep.space.examples()[0])[0], Sharing.of(sweep.shared, sweep.config.sweep)
    missing = _missing(sweep, run)
    if arguments.dry_run:
        _print_plan(sweep, run, sharing)
        for line in missing:
            print(f"still needed: {line}")
        return 0
    if sharing.run(run.config, "prepare_shards").artifact("prepare_shards") is None:
        check_sources(run)
    if missing:
        raise UserError(missing[0])
    told = callbacks(sweep)
    points = _trials.points_to_run(sweep)
    if points or sweep.config.search.method == "optuna":
        sweep.storage.write_bytes("sweep.yaml", to_text(as_written(sweep)).encode())
        share = _trials.peak(run)
        with cluster(run.config, cpus=share.cpus * (sweep.config.max_concurrent or 1)):
            _tune(sweep, Workshop.open(sharing, works), points, _trials.concurrent_trials(sweep, share), told)
    return _finish(sweep)


def _tune(
    sweep: Sweep, workshop: Workshop, points: Sequence[Point], concurrent: int, told: list[tune.Callback]
) -> None:
    """Run the trials that are left."""
    tuner = tune.Tuner(
        _trials.trainable(sweep, workshop),
        param_space=_trials.param_space(sweep, points),
        tune_config=_trials.tune_config(sweep, points, concurrent),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=_trials.tune_folder(sweep),
            failure_config=tune.FailureConfig(max_failures=sweep.config.retries),
            callbacks=told,
            verbose=0,
        ),
    )
    with workshop.shown():
        tuner.fit()


def _finish(sweep: Sweep) -> int:
    """Write the results and say where they are; 1 where trials failed."""
    write_sweep(sweep)
    known = {name_of_trial(point) for point in sweep.points()}
    states = Counter(entry.state for name, entry in read_ledger(sweep).items() if name in known or not known)
    print(f"trials: {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}")
    print(f"frontier: {sweep.storage.url(FRONTIER)}")
    if states["running"]:
        raise KeyboardInterrupt  # the same command goes on with them
    return 1 if states["failed"] else 0


def _missing(sweep: Sweep, run: Run) -> list[str]:
    """What has to be fetched before every point can be run; all are looked at as if they were one run."""
    at_home = {"name": run.config.name, "storage": run.config.storage}
    runs = [Run(sweep.full_config(point).model_copy(update=at_home)) for point in sweep.space.examples()]
    return list(dict.fromkeys(line for run in runs for line in preflight(run, list(JOBS))))


def _print_plan(sweep: Sweep, run: Run, sharing: Sharing) -> None:
    """The points, what trials share, and what a trial takes."""
    config, ledger = sweep.config, read_ledger(sweep)
    table = Table(title=f"sweep {config.name} in {sweep.storage.url()}", title_justify="left")
    for column in ("trial", "state", "sets"):
        table.add_column(column)
    points = sweep.points() or [entry.point for entry in ledger.values()]
    for point in points:
        entry = ledger.get(name_of_trial(point))
        table.add_row(name_of_trial(point), entry.state if entry else "to do", describe(point))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 150).print(table)
    runs = [run for point in points for run in sweep.runs(point)]
    for job in SHARED_JOBS:
        made = {sharing.run(run.config, job).config.name for run in runs}
        print(f"{JOBS[job].makes}: made {len(made)} times for {len(runs)} runs")
    prefixes = [prefix for run in runs if (prefix := sharing.prefix(run.config)) is not None]
    if prefixes:
        made = {sharing.run(prefix, "train_vavae").config.name for prefix in prefixes}
        print(f"tokenizer up to the stage that varies: made {len(made)} times")
    share = _trials.peak(run)
    print(f"a trial takes up to {share.cpus:g} CPUs and {share.gpus:g} GPUs at once")


if __name__ == "__main__":
    sys.exit(main())
