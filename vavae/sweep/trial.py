"""One trial: its runs from images to metrics, with cheap checks first, and its entry in the ledger."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

from vavae.config import digest, identity
from vavae.config.load import dump
from vavae.errors import UserError
from vavae.evaluation.metric import read_metrics
from vavae.runs.config import RunConfig
from vavae.runs.jobs import JOBS, Job
from vavae.runs.run import Run
from vavae.sweep.config import ThresholdConfig
from vavae.sweep.sharing import Sharing, content_key, link_artifact, link_files
from vavae.sweep.space import Point
from vavae.sweep.sweep import Sweep, name_of_trial
from vavae.training.logging.log import read_rows

IMAGES = "images_seen"
"""Key of the images seen by the LightningDiT in the reports of a trial."""

Task = Job | Literal["evaluate_tokenizer"]
"""A job, or the evaluation of a tokenizer by itself."""

TaskRequest = Callable[[RunConfig, Task], Run]
"""Has a task run, once for all that request the same, and returns the run that holds what it makes."""

State = Literal["running", "finished", "stopped", "failed"]

_TOKENIZER_FILE, _LEDGER, _RUNGS = "tokenizer-measures.json", "ledger", "rungs"
_PARTS: dict[str, Job] = {"references": "prepare_shards", "measuring": "train_vavae"}
"""Folders of what evaluations share, features of real images and metrics of reconstructions, and whose run has them."""


class Entry(NamedTuple):
    """Entry of a trial in the ledger of a sweep."""

    point: Point
    state: State
    why: str = ""


def write_entry(sweep: Sweep, entry: Entry) -> None:
    """Write the entry of a trial, in place of the one before."""
    path = f"{_LEDGER}/{name_of_trial(entry.point)}.json"
    sweep.storage.write_json(path, {"key": _trial_key(sweep, entry.point), **entry._asdict()})


def read_ledger(sweep: Sweep) -> dict[str, Entry]:
    """Read the entries of a sweep, by names of trials.

    Points that its space no longer has are left out, and so are those that were run with other seeds, rungs or
    thresholds, or on another base.
    """
    storage = sweep.storage
    entries = {}
    for path in storage.list(_LEDGER):
        stored = storage.read_json(path)
        point = sweep.space.known_point(stored["point"])
        if point is not None and stored["key"] == _trial_key(sweep, point):
            entries[name_of_trial(point)] = Entry(point, stored["state"], stored["why"])
    return entries


def run_trial(sweep: Sweep, point: Point, request: TaskRequest, report: Callable[[dict[str, float]], None]) -> None:
    """Run a trial; results that are in storage are reported again, not made again.

    Args:
        sweep: the sweep.
        point: of the trial.
        request: has the tasks run.
        report: takes, after each rung, the images seen and the means of the metrics over the seeds.

    Raises:
        UserError: a run can't be made as the point says.
    """
    runs = _from_another_seed_on(sweep, point)
    write_entry(sweep, Entry(point, "running"))
    broken = _broken_threshold(sweep.config.thresholds, runs, request)
    if broken is not None:
        write_entry(sweep, Entry(point, "stopped", broken))
        return
    last_shared = Sharing.of(sweep).jobs[-1]
    for images in [*sweep.config.rungs, None]:
        rows = [
            row
            for run in runs
            if (row := _metrics_at_budget(Run(_with_budget(run.config, images)), request, last_shared)) is not None
        ]
        if len(rows) == len(runs):
            means = _means(sweep, rows)
            if images is None:
                write_entry(sweep, Entry(point, "finished"))  # now, for Tune may end a trial that reports its budget
            report({IMAGES: rows[0][IMAGES], **means})
        elif images is None:
            raise UserError(
                f"{runs[0].storage.url()}: its LightningDiT has seen more than train_lightningdit.images, its budget; "
                "raise that, or give the sweep another name"
            )


def _from_another_seed_on(sweep: Sweep, point: Point) -> list[Run]:
    """The runs of a trial, begun at another seed than those of the trial before: both would wait for one tokenizer."""
    runs, points = sweep.runs(point), sweep.points()
    first = points.index(point) % len(runs) if point in points else 0
    return runs[first:] + runs[:first]


def _means(sweep: Sweep, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of the metrics over the seeds; raises UserError where an objective is not among them."""
    means = mean(rows)
    for objective in sweep.config.objectives:
        if objective.measure not in means:
            raise UserError(f"objectives: the metrics of a run are {', '.join(means)}, and not {objective.measure}")
    return means


def metrics_by_rung(run: Run) -> dict[int, dict[str, float]]:
    """The metrics of a run, by images seen by its LightningDiT."""
    rows = (run.storage.read_json(path) for path in run.storage.list(_RUNGS))
    return {row[IMAGES]: row["measures"] for row in rows if row["key"] == _key(run.config)}


def write_rung(config: RunConfig, images: int, metrics: Mapping[str, float]) -> None:
    """Store the metrics of the run of a configuration, whose LightningDiT has seen so many images."""
    row = {IMAGES: images, "key": _key(config), "measures": dict(metrics)}
    Run(config).storage.write_json(f"{_RUNGS}/{images:012d}.json", row)


def mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric that all rows have."""
    shared = [name for name in rows[0] if all(name in row for row in rows) and name != IMAGES]
    return {name: fmean(row[name] for row in rows) for name in shared}


def _with_budget(config: RunConfig, images: int | None) -> RunConfig:
    """The configuration with the budget of its LightningDiT lowered to a rung; None keeps it."""
    budget = config.train_lightningdit.images
    if images is None or images >= budget:
        return config
    shorter = config.train_lightningdit.model_copy(update={"images": images})
    return config.model_copy(update={"train_lightningdit": shorter})


def _metrics_at_budget(run: Run, request: TaskRequest, last_shared: Job) -> dict[str, float] | None:
    """The metrics of a run at its budget, evaluated unless known; None where it was trained further already."""
    budget = run.budget("train_lightningdit")
    assert budget is not None, "a training has a budget"
    known = metrics_by_rung(run)
    if budget not in known:
        _link_shared_artifacts(run, request, last_shared)
        trained = run.artifact("train_lightningdit")
        if trained is not None and (trained.images_seen or 0) > budget:
            return None
        for job in ("train_lightningdit", "sample"):
            request(run.config, job)
        _evaluate(run, request, "evaluate")
        metrics = {metric.name: metric.value for metric in read_metrics(run.storage)}
        write_rung(run.config, budget, metrics)
        known = {budget: metrics}
    return {IMAGES: budget, **known[budget]}


def _evaluate(run: Run, request: TaskRequest, task: Task) -> None:
    """Have a run evaluated, without what was evaluated for another run with the same shards or tokenizer."""
    keepers = {folder: request(run.config, job).storage for folder, job in _PARTS.items()}
    for folder, keeper in keepers.items():
        link_files(keeper, run.storage, folder)
    request(run.config, task)
    for folder, keeper in keepers.items():
        link_files(run.storage, keeper, folder)


def _link_shared_artifacts(run: Run, request: TaskRequest, last: Job) -> None:
    """Have the artifacts that trials share made, up to those of a job, and link them into a run."""
    run.storage.write_bytes("config.yaml", dump(run.config).encode())
    for job in JOBS:
        link_artifact(request(run.config, job), run, job)
        if job == last:
            return


def _broken_threshold(thresholds: Mapping[str, ThresholdConfig], runs: list[Run], request: TaskRequest) -> str | None:
    """The first threshold that the tokenizers of runs break on average, in words; None where they break none."""
    if not thresholds:
        return None
    means = mean([_tokenizer_metrics(run, request) for run in runs])
    for name, threshold in thresholds.items():
        if name not in means:
            raise UserError(f"thresholds.{name}: the tokenizer's log has no such scalar; there are {', '.join(means)}")
        limit = threshold.broken_by(means[name])
        if limit is not None:
            return f"{name} is {means[name]:.4g}, and should be {limit}"
    return None


def _tokenizer_metrics(run: Run, request: TaskRequest) -> dict[str, float]:
    """The metrics of a run's tokenizer by itself, and the scalars of the last row of its log."""
    _link_shared_artifacts(run, request, "train_vavae")
    if not run.storage.exists(_TOKENIZER_FILE) or run.storage.read_json(_TOKENIZER_FILE)["key"] != _tokenizer_key(run):
        _evaluate(run, request, "evaluate_tokenizer")
    metrics = run.storage.read_json(_TOKENIZER_FILE)["measures"]
    rows = read_rows(run.storage.child(f"{run.training_prefix('train_vavae')}/log"))
    logged = rows[-1] if rows else {}
    return {**metrics, **{name: value for name, value in logged.items() if "/" in name}}


def write_tokenizer_metrics(run: Run, metrics: Mapping[str, float]) -> None:
    """Store the metrics of a run's tokenizer by itself, the result of the task `evaluate_tokenizer`."""
    run.storage.write_json(_TOKENIZER_FILE, {"key": _tokenizer_key(run), "measures": dict(metrics)})


def _tokenizer_key(run: Run) -> str:
    """Digest of all that the metrics of a run's tokenizer depend on."""
    return digest({"tokenizer": run.require("train_vavae").digest, **run.identity("evaluate")})


def _trial_key(sweep: Sweep, point: Point) -> str:
    """Digest of all that the result of a trial depends on."""
    refusal = sweep.refusal(point)
    if refusal is not None:
        return digest({"refusal": refusal})
    return trial_key(sweep, [run.config for run in sweep.runs(point)])


def trial_key(sweep: Sweep, configs: Sequence[RunConfig]) -> str:
    """Digest of all that the result of a trial depends on, given the configurations of its runs."""
    images = [Run(config).budget("train_lightningdit") for config in configs]
    settings = {"images": images, "rungs": sweep.config.rungs, "thresholds": sweep.config.thresholds}
    return digest({"runs": [_key(config) for config in configs], **settings})


def _key(config: RunConfig) -> str:
    """Digest of all that the metrics of a run depend on besides the images seen by its LightningDiT."""
    return digest({"config": identity(config), "latents": content_key(config, "precompute_latents")})
