"""One trial: its runs from images to measures, cheap signals first, and what storage remembers of it."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

from vavae.config import digest, identity
from vavae.config.load import dump
from vavae.errors import UserError
from vavae.evaluation.metric import read_metrics
from vavae.runs.config import RunConfig
from vavae.runs.run import JOBS, Job, Run
from vavae.sweep.config import ThresholdConfig
from vavae.sweep.sharing import content_key, link_artifact, link_files
from vavae.sweep.space import Point
from vavae.sweep.sweep import Sweep, name_of_trial
from vavae.training.logging.log import read_rows

IMAGES = "images_seen"
"""In what a trial reports: images that the LightningDiT has seen."""

Task = Job | Literal["measure_tokenizer"]
"""A job, or the measures of a tokenizer by itself."""

TaskRequest = Callable[[RunConfig, Task], Run]
"""Has a task done, once for all who ask for the same, and returns the run that has what it makes."""

State = Literal["running", "finished", "stopped", "failed"]

_EARLY, _LEDGER, _RUNGS = "tokenizer-measures.json", "ledger", "rungs"
_REFERENCES = "references"


class Entry(NamedTuple):
    """What the ledger of a sweep says of a trial."""

    point: Point
    state: State
    why: str = ""


def write_entry(sweep: Sweep, entry: Entry) -> None:
    """Put a trial's entry in place of the one before."""
    path = f"{_LEDGER}/{name_of_trial(entry.point)}.json"
    sweep.storage.write_json(path, {"key": _trial_key(sweep, entry.point), **entry._asdict()})


def read_ledger(sweep: Sweep) -> dict[str, Entry]:
    """The entries of a sweep by the names of the trials.

    Points that its space no longer has are left out, and so are those that were run in another way: with other seeds,
    rungs or thresholds, or on another base.
    """
    storage = sweep.storage
    entries = {}
    for path in storage.list(_LEDGER):
        stored = storage.read_json(path)
        point = sweep.space.known_point(stored["point"])
        if point is not None and stored["key"] == _trial_key(sweep, point):
            entries[name_of_trial(point)] = Entry(point, stored["state"], stored["why"])
    return entries


def run_trial(sweep: Sweep, point: Point, order: TaskRequest, report: Callable[[dict[str, float]], None]) -> None:
    """Take a point through all its runs; what storage remembers is reported again and not done again.

    Args:
        sweep: the sweep.
        point: the trial.
        order: has the jobs done.
        report: given, after each rung, the images seen and the means of the measures over the seeds.

    Raises:
        UserError: a run can't be what the point says.
    """
    runs = sweep.runs(point)
    write_entry(sweep, Entry(point, "running"))
    broken = _broken_threshold(sweep.config.thresholds, runs, order)
    if broken is not None:
        write_entry(sweep, Entry(point, "stopped", broken))
        return
    for images in [*sweep.config.rungs, None]:
        rows = [row for run in runs if (row := _measured(_at(run, images), order)) is not None]
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


def _means(sweep: Sweep, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the seeds; UserError where an objective is not among them."""
    means = mean(rows)
    for objective in sweep.config.objectives:
        if objective.measure not in means:
            raise UserError(f"objectives: a run measures {', '.join(means)}, and no {objective.measure}")
    return means


def rungs_of(run: Run) -> dict[int, dict[str, float]]:
    """What was measured of a run, by the images that its LightningDiT had seen."""
    rows = (run.storage.read_json(path) for path in run.storage.list(_RUNGS))
    return {row[IMAGES]: row["measures"] for row in rows if row["key"] == _key(run.config)}


def mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each measure that all rows have."""
    shared = [name for name in rows[0] if all(name in row for row in rows) and name != IMAGES]
    return {name: fmean(row[name] for row in rows) for name in shared}


def _at(run: Run, images: int | None) -> Run:
    """The run with a budget of its LightningDiT that ends at a rung; None is its own."""
    config = run.config
    budget = config.train_lightningdit.images
    if images is None or images >= budget:
        return run
    shorter = config.train_lightningdit.model_copy(update={"images": images})
    return Run(config.model_copy(update={"train_lightningdit": shorter}))


def _measured(run: Run, order: TaskRequest) -> dict[str, float] | None:
    """The measures of a run at its budget, made where they are not there; None where it is further already."""
    budget = run.budget("train_lightningdit")
    assert budget is not None, "a training has a budget"
    known = rungs_of(run)
    if budget not in known:
        _link_shared_artifacts(run, order, "precompute_latents")
        trained = run.artifact("train_lightningdit")
        if trained is not None and (trained.images_seen or 0) > budget:
            return None
        for job in ("train_lightningdit", "sample"):
            order(run.config, job)
        _measure(run, order, "evaluate")
        measures = {metric.name: metric.value for metric in read_metrics(run.storage)}
        row = {IMAGES: budget, "key": _key(run.config), "measures": measures}
        run.storage.write_json(f"{_RUNGS}/{budget:012d}.json", row)
        known = {budget: measures}
    return {IMAGES: budget, **known[budget]}


def _measure(run: Run, order: TaskRequest, task: Task) -> None:
    """Have a run measured, against references that are made once for all runs with the same shards."""
    shards = order(run.config, "prepare_shards")
    link_files(shards, run, _REFERENCES)
    order(run.config, task)
    link_files(run, shards, _REFERENCES)


def _link_shared_artifacts(run: Run, order: TaskRequest, last: Job) -> None:
    """Have made what trials share, up to a job, and give it to the run."""
    run.storage.write_bytes("config.yaml", dump(run.config).encode())
    for job in JOBS:
        link_artifact(order(run.config, job), run, job)
        if job == last:
            return


def _broken_threshold(thresholds: Mapping[str, ThresholdConfig], runs: list[Run], order: TaskRequest) -> str | None:
    """The first threshold that the runs' tokenizers break on average, in words."""
    if not thresholds:
        return None
    signals = mean([_signals(run, order) for run in runs])
    for name, threshold in thresholds.items():
        if name not in signals:
            raise UserError(
                f"thresholds.{name}: the tokenizer's log has no such scalar; there are {', '.join(signals)}"
            )
        limit = threshold.broken_by(signals[name])
        if limit is not None:
            return f"{name} is {signals[name]:.4g}, and should be {limit}"
    return None


def _signals(run: Run, order: TaskRequest) -> dict[str, float]:
    """What is known of a run's tokenizer before its latents: measures, and the last row of its log."""
    _link_shared_artifacts(run, order, "train_vavae")
    if not run.storage.exists(_EARLY) or run.storage.read_json(_EARLY)["key"] != _early_key(run):
        _measure(run, order, "measure_tokenizer")
    measures = run.storage.read_json(_EARLY)["measures"]
    rows = read_rows(run.storage.child(f"{run.training_prefix('train_vavae')}/log"))
    logged = rows[-1] if rows else {}
    return {**measures, **{name: value for name, value in logged.items() if "/" in name}}


def write_signals(run: Run, measures: Mapping[str, float]) -> None:
    """Keep the measures of a run's tokenizer by itself: the end of the task `measure_tokenizer`."""
    run.storage.write_json(_EARLY, {"key": _early_key(run), "measures": dict(measures)})


def _early_key(run: Run) -> str:
    """What the measures of a tokenizer depend on."""
    return digest({"tokenizer": run.require("train_vavae").digest, **run.identity("evaluate")})


def _trial_key(sweep: Sweep, point: Point) -> str:
    """What a trial comes to depends on this."""
    config, refusal = sweep.config, sweep.refusal(point)
    if refusal is not None:
        return digest({"refusal": refusal})
    runs = sweep.runs(point)
    images = [run.budget("train_lightningdit") for run in runs]
    ways = {"images": images, "rungs": config.rungs, "thresholds": config.thresholds}
    return digest({"runs": [_key(run.config) for run in runs], **ways})


def _key(config: RunConfig) -> str:
    """What the measures of a run depend on, besides the images that its LightningDiT has seen."""
    return digest({"config": identity(config), "latents": content_key(config, "precompute_latents")})
