"""The trials of a sweep under Ray Tune: the trainable, how points are proposed and judged, and how many fit."""

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import SearchAlgorithm, Searcher

from ray_jobs.runtime.actor_pool import Share
from ray_jobs.tune.shared_tasks import Workshop
from vavae.errors import UserError
from vavae.randomness import key_seed
from vavae.runs.run import Run
from vavae.sweep.config import DomainConfig
from vavae.sweep.space import Point
from vavae.sweep.sweep import Sweep, name_of_trial
from vavae.sweep.trial import IMAGES, Entry, read_ledger, run_trial, write_entry

POINT = "point"
"""Key of the point in what Tune gives to a trial."""
_TOKEN: dict[str, float] = {"memory": 1}
"""What a trial takes itself, a byte: it must take something, and a share of a CPU would be missing to its workers."""


def trainable(sweep: Sweep, workshop: Workshop) -> Any:
    """What Tune runs as a trial."""
    return tune.with_resources(tune.with_parameters(_trial, sweep=sweep, workshop=workshop), _TOKEN)


def _trial(settings: dict[str, Any], sweep: Sweep, workshop: Workshop) -> None:
    point = settings[POINT]
    try:
        run_trial(sweep, point, workshop.order, tune.report)
    except Exception as error:
        # Here, for Tune hands on an error only where it can be pickled.
        if name_of_trial(point) in read_ledger(sweep):
            write_entry(sweep, Entry(point, "running", _reason(error)))
        raise


def _reason(error: Exception) -> str:
    """The last line of what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def points_to_run(sweep: Sweep) -> list[Point]:
    """The points that are known and still to be gone through: all, where others are judged by how they came out."""
    ledger = read_ledger(sweep)
    if sweep.config.search.method == "optuna":
        return [entry.point for entry in ledger.values()]
    if sweep.config.early_stopping.rule != "none":
        return sweep.points()
    settled = {name for name, entry in ledger.items() if entry.state in ("finished", "stopped")}
    return [point for point in sweep.points() if name_of_trial(point) not in settled]


def tune_config(sweep: Sweep, points: Sequence[Point], max_concurrent: int) -> tune.TuneConfig:
    """How Tune chooses, judges and names trials."""
    optuna = sweep.config.search.method == "optuna"
    return tune.TuneConfig(
        search_alg=_optuna(sweep, points) if optuna else None,
        scheduler=_scheduler(sweep),
        num_samples=sweep.config.search.trials or 1 if optuna else 1,
        max_concurrent_trials=max_concurrent,
        reuse_actors=True,
        trial_name_creator=name_of,
        trial_dirname_creator=name_of,
    )


def param_space(sweep: Sweep, points: Sequence[Point]) -> dict[str, Any]:
    """What Tune gives to the trials, where it isn't Optuna that proposes."""
    return {} if sweep.config.search.method == "optuna" else {POINT: tune.grid_search(list(points))}


def name_of(trial: Trial) -> str:
    """The name of a trial of Tune's, which is that of its point."""
    return name_of_trial(trial.config[POINT])


def _mode(better: str) -> str:
    return "max" if better == "higher" else "min"


def _optuna(sweep: Sweep, points: Sequence[Point]) -> Searcher | SearchAlgorithm:
    """Optuna's search, which first hears again how the points of a former attempt came out."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("search.method=optuna needs Optuna: pip install -e '.[sweep]'")
    from ray.tune.search.optuna import OptunaSearch

    objectives = sweep.config.objectives
    measures, modes = [one.measure for one in objectives], [_mode(one.better) for one in objectives]
    single = len(objectives) == 1
    return OptunaSearch(
        space=partial(_suggest, sweep),
        metric=measures[0] if single else measures,
        mode=modes[0] if single else modes,
        points_to_evaluate=[{f"{POINT}/{path}": value for path, value in point.items()} for point in points],
        # Another one after each attempt, or it would draw what it has drawn before.
        seed=key_seed(sweep.config.search.seed, "optuna", len(points)) % 2**32,
    )


def _suggest(sweep: Sweep, trial: Any) -> None:
    """Let an Optuna trial choose a point, key by key."""

    def choose(path: str, domain: DomainConfig) -> str | float:
        name = f"{POINT}/{path}"
        if domain.range is None:
            return trial.suggest_categorical(name, list(domain.options))
        return trial.suggest_float(name, *domain.range, log=domain.loguniform is not None)

    sweep.space.walk(choose)


def _scheduler(sweep: Sweep) -> TrialScheduler | None:
    """Who ends trials early. The time is images, and the first rung is the grace period."""
    config, (objective, *_) = sweep.config.early_stopping, sweep.config.objectives
    if config.rule == "none":
        return None
    budget = sweep.run_config(sweep.space.examples()[0], sweep.config.seeds[0]).train_lightningdit.images
    grace = min((*sweep.config.rungs, budget))
    judged: dict[str, Any] = {"time_attr": IMAGES, "metric": objective.measure, "mode": _mode(objective.better)}
    if config.rule == "median":
        return MedianStoppingRule(**judged, grace_period=grace)
    return AsyncHyperBandScheduler(**judged, max_t=budget, grace_period=grace, reduction_factor=config.reduction_factor)


def tune_folder(sweep: Sweep) -> str:
    """Where Tune leaves its own files: a local folder, for its clients of stores know none of our options."""
    storage = sweep.storage
    return storage.url() if storage.is_local else str(Path(storage.cache).expanduser() / "ray" / sweep.config.name)


def peak(run: Run) -> Share:
    """The most that a run ever takes of a cluster at once."""
    config, worker, beside = run.config, Share.of(run), Share.beside(run)
    training = Share(*(config.workers.count * each + extra for each, extra in zip(worker, beside, strict=True)))
    taken = [
        (1, training),
        (config.latents.actors, Share.of(run, config.latents.cpus, config.latents.gpus)),
        (config.sample.actors, worker),
        (config.evaluate.actors, worker),
    ]
    return Share(max(count * share.cpus for count, share in taken), max(count * share.gpus for count, share in taken))


def concurrent_trials(sweep: Sweep, share: Share) -> int:
    """How many trials may go on at the same time: each must have its peak, or two could wait for each other's half.

    Raises:
        UserError: the cluster does not hold as many as the sweep file says.
    """
    there = ray.cluster_resources()
    room = min(int(there.get(kind, 0) / amount) for kind, amount in zip(("CPU", "GPU"), share, strict=True) if amount)
    wanted = sweep.config.max_concurrent
    if wanted is not None and wanted > max(room, 1):
        raise UserError(
            f"max_concurrent={wanted}: a trial takes up to {share.cpus:g} CPUs and {share.gpus:g} GPUs, of which the "
            f"cluster has {there.get('CPU', 0):g} and {there.get('GPU', 0):g}; lower it, or workers, latents.actors "
            "and sample.actors of the run"
        )
    return wanted or max(room, 1)
