"""The search of a sweep under Ray Tune: the trainable, search algorithm, scheduler, and trials that run at once."""

import importlib.util
import traceback
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import SearchAlgorithm, Searcher

from ray_jobs.runtime.resources import Resources
from ray_jobs.tune.shared_tasks import SharedTasks
from vavae.errors import UserError
from vavae.randomness import key_seed
from vavae.runs.config import RunConfig
from vavae.sweep.config import DomainConfig
from vavae.sweep.space import Point
from vavae.sweep.sweep import Sweep, name_of_trial
from vavae.sweep.trial import IMAGES, Entry, read_ledger, run_trial, write_entry

POINT = "point"
"""Key of the point in the configuration that Tune gives to a trial."""
_TRIAL_RESOURCES: dict[str, float] = {"memory": 1}
"""A byte: a trial must take something, and a part of a CPU would be missing to the workers of its jobs."""


def tuner(
    sweep: Sweep, shared_tasks: SharedTasks, points: Sequence[Point], max_concurrent: int, callbacks: list[Callback]
) -> tune.Tuner:
    """The tuner that runs the trials of points, and of those that Optuna suggests.

    Args:
        sweep: the sweep.
        shared_tasks: runs the tasks of the trials.
        points: to run; for Optuna those whose results it has to know again.
        max_concurrent: trials at once.
        callbacks: of the trials.
    """
    optuna, storage = sweep.config.search.method == "optuna", sweep.storage
    trial = tune.with_parameters(_trial, sweep=sweep, shared_tasks=shared_tasks)
    return tune.Tuner(
        tune.with_resources(trial, _TRIAL_RESOURCES),
        param_space={} if optuna else {POINT: tune.grid_search(list(points))},
        tune_config=tune.TuneConfig(
            search_alg=_optuna(sweep, points) if optuna else None,
            scheduler=_scheduler(sweep),
            num_samples=sweep.config.search.trials or 1 if optuna else 1,
            max_concurrent_trials=max_concurrent,
            reuse_actors=True,
            trial_name_creator=name_of,
            trial_dirname_creator=name_of,
        ),
        run_config=tune.RunConfig(
            name="tune",
            # Local, for Tune's own clients of object stores know none of our options.
            storage_path=storage.url() if storage.is_local else str(storage.cache_folder / "ray" / sweep.config.name),
            failure_config=tune.FailureConfig(max_failures=sweep.config.retries),
            callbacks=callbacks,
            verbose=0,
        ),
    )


def _trial(settings: dict[str, Any], sweep: Sweep, shared_tasks: SharedTasks) -> None:
    point = settings[POINT]
    try:
        run_trial(sweep, point, shared_tasks.request, tune.report)
    except Exception as error:
        # Here, for Tune hands on an error only where it can be pickled.
        write_entry(sweep, Entry(point, "running", _reason(error)))
        raise


def _reason(error: Exception) -> str:
    """The last line of what went wrong, wherever on the cluster that was; a user's error is its message."""
    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    text = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception_only(error))
    return last_line(text)


def last_line(text: str) -> str:
    """The last line of a text that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def points_to_run(sweep: Sweep) -> list[Point]:
    """The known points that are still to run; all of them where the rule of early stopping compares trials."""
    ledger = read_ledger(sweep)
    if sweep.config.search.method == "optuna":
        return [entry.point for entry in ledger.values()]
    if sweep.config.early_stopping.rule != "none":
        return sweep.points()
    ended = {name for name, entry in ledger.items() if entry.state in ("finished", "stopped")}
    return [point for point in sweep.points() if name_of_trial(point) not in ended]


def name_of(trial: Trial) -> str:
    """The name of a trial of Tune, which is that of its point."""
    return name_of_trial(trial.config[POINT])


def _mode(better: str) -> str:
    return "max" if better == "higher" else "min"


def _optuna(sweep: Sweep, points: Sequence[Point]) -> Searcher | SearchAlgorithm:
    """Optuna's search, which begins with the points of a former attempt, whose results are reported again."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("search.method=optuna needs Optuna: pip install -e '.[sweep]'")
    from ray.tune.search.optuna import OptunaSearch

    objectives = sweep.config.objectives
    metrics, modes = [one.measure for one in objectives], [_mode(one.better) for one in objectives]
    single = len(objectives) == 1
    return OptunaSearch(
        space=partial(_suggest, sweep),
        metric=metrics[0] if single else metrics,
        mode=modes[0] if single else modes,
        points_to_evaluate=[{f"{POINT}/{path}": value for path, value in point.items()} for point in points],
        # Another one after each attempt, or it would draw what it has drawn before.
        seed=key_seed(sweep.config.search.seed, "optuna", len(points)) % 2**32,
    )


def _suggest(sweep: Sweep, trial: Any) -> None:
    """Let an Optuna trial suggest a point, key by key."""

    def choose(path: str, domain: DomainConfig) -> str | float:
        name = f"{POINT}/{path}"
        if domain.range is None:
            return trial.suggest_categorical(name, list(domain.options))
        return trial.suggest_float(name, *domain.range, log=domain.loguniform is not None)

    sweep.space.walk(choose)


def _scheduler(sweep: Sweep) -> TrialScheduler | None:
    """The rule of early stopping as a scheduler; its time is images, and its grace period the first rung."""
    config, (objective, *_) = sweep.config.early_stopping, sweep.config.objectives
    if config.rule == "none":
        return None
    budget = sweep.run_config(sweep.space.examples()[0], sweep.config.seeds[0]).train_lightningdit.images
    grace = min((*sweep.config.rungs, budget))
    terms: dict[str, Any] = {"time_attr": IMAGES, "metric": objective.measure, "mode": _mode(objective.better)}
    if config.rule == "median":
        return MedianStoppingRule(**terms, grace_period=grace)
    return AsyncHyperBandScheduler(**terms, max_t=budget, grace_period=grace, reduction_factor=config.reduction_factor)


def peak_resources(config: RunConfig) -> Resources:
    """The most that a run ever takes of a cluster at once."""
    worker, evaluation = Resources.of(config.workers), Resources.for_checkpoint_evaluation(config)
    training = Resources(*(config.workers.count * each + extra for each, extra in zip(worker, evaluation, strict=True)))
    taken = [
        (1, training),
        (config.latents.actors, Resources.of(config.workers, config.latents.cpus, config.latents.gpus)),
        (config.sample.actors, worker),
        (config.evaluate.actors, worker),
    ]
    return Resources(max(count * each.cpus for count, each in taken), max(count * each.gpus for count, each in taken))


def concurrent_trials(sweep: Sweep, peak: Resources) -> int:
    """Number of trials that may run at once: each must have its peak, or two could wait for each other's half.

    Args:
        sweep: the sweep.
        peak: the most that a trial takes at once.

    Raises:
        UserError: the cluster does not hold as many as the sweep file says.
    """
    there = ray.cluster_resources()
    room = min(int(there.get(kind, 0) / amount) for kind, amount in zip(("CPU", "GPU"), peak, strict=True) if amount)
    wanted = sweep.config.max_concurrent
    if wanted is not None and wanted > max(room, 1):
        raise UserError(
            f"max_concurrent={wanted}: a trial takes up to {peak.cpus:g} CPUs and {peak.gpus:g} GPUs, of which the "
            f"cluster has {there.get('CPU', 0):g} and {there.get('GPU', 0):g}; lower it, or workers, latents.actors "
            "and sample.actors of the run"
        )
    return wanted or max(room, 1)
