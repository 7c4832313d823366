"""The page of a sweep, from the results of its trials."""

import io
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

from PIL import Image

from vavae.config.yaml_source import to_text
from vavae.data.image import png_bytes
from vavae.report.figures import Picture
from vavae.report.html import number, page
from vavae.runs.commit import commit_of_code
from vavae.runs.files import SAMPLES
from vavae.sweep.charts import (
    Numbered,
    curves_chart,
    frontier_chart,
    parallel_trials,
    probe_charts,
    sensitivity_charts,
    short_names,
)
from vavae.sweep.config import KNOWN_METRICS, ObjectiveConfig
from vavae.sweep.plots import RANKED, label
from vavae.sweep.sweep import Sweep, as_written, describe
from vavae.sweep.trial_results import (
    FEWEST_RANKED,
    GENERATION,
    RankCorrelation,
    SeedMean,
    TrialResult,
    front,
    importances,
    speed_ups,
)

_PICTURED = 60
"""Trials that show samples at most: a large sweep must not make a large page."""
_PICTURE_PIXELS = 288
"""Sides of the part of a picture of samples that a trial shows, at most."""


class _Ranked(NamedTuple):
    """A trial in a ranking, with places in percent of the width."""

    number: int
    label: str
    value: str
    place: float
    low: float
    width: float


def sweep_page(
    sweep: Sweep,
    results: Sequence[TrialResult],
    correlations: Sequence[RankCorrelation],
    missing: Mapping[str, Mapping[str, str]],
    best: Sequence[str],
) -> str:
    """Page of a sweep, as HTML.

    Args:
        sweep: the sweep.
        results: of its trials.
        correlations: of probes with distances.
        missing: words for metrics that a trial was asked for and does not have, by trial.
        best: files of the best configurations.
    """
    trials = [Numbered(place, one) for place, one in enumerate(results, 1)]
    states = [one.state for one in results]
    summary = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    objectives = sweep.config.objectives
    frontier = frontier_chart(sweep, trials)
    return page(
        "sweep/frontier.html",
        label=label,
        title=sweep.config.name,
        summary=f"A sweep; trials: {summary}" if states else "A sweep that has not begun",
        byline=_byline(sweep),
        one_seed=len(sweep.config.seeds) == 1,
        best=[_best(trials, objective) for objective in objectives if _having(trials, objective)],
        frontier=frontier,
        rankings=[] if frontier and len(objectives) > 1 else [(each, _ranking(trials, each)) for each in objectives],
        curves=curves_chart(sweep, trials),
        columns=_columns(sweep, results, missing),
        rows=_rows(sweep, trials, missing),
        details=[_details(sweep, one) for one in trials],
        parallel=parallel_trials(sweep, trials),
        sensitivities=sensitivity_charts(sweep, trials),
        objectives=objectives,
        importances=_importances(sweep, results),
        generation=GENERATION,
        speed_ups=_speed_ups(sweep, trials),
        distances=list(dict.fromkeys(one.distance for one in correlations)),
        correlations=_correlations(correlations),
        probes=probe_charts(trials, correlations),
        facts={
            "storage": sweep.storage.url(),
            "seeds": ", ".join(map(str, sweep.config.seeds)),
            "objectives": ", ".join(f"{one.measure} ({one.better} is better)" for one in objectives),
            "best": ", ".join(best),
        },
        config=to_text(as_written(sweep)),
    )


def _byline(sweep: Sweep) -> str:
    seeds, commit = len(sweep.config.seeds), commit_of_code()
    parts = [f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC", "one seed" if seeds == 1 else f"{seeds} seeds"]
    if commit is not None:
        parts.append(f"page by commit {commit[:12]}")
    return " · ".join(parts)


def _having(trials: Sequence[Numbered], objective: ObjectiveConfig) -> list[Numbered]:
    """Finished trials that have an objective, the best first."""
    found = [one for one in trials if objective.measure in one.result.last]
    found.sort(key=lambda one: one.result.last[objective.measure].mean, reverse=objective.better == "higher")
    return found


def _best(trials: Sequence[Numbered], objective: ObjectiveConfig) -> dict[str, Any]:
    """The best trial by an objective, and how many others seeds do not tell from it."""
    first, *others = _having(trials, objective)
    metric = first.result.last[objective.measure]
    near = [
        one
        for one in others
        if abs(metric.mean - (other := one.result.last[objective.measure]).mean)
        <= (metric.deviation or 0.0) + (other.deviation or 0.0)
    ]
    if metric.deviation is None:
        doubt = "of one seed"
    else:
        doubt = f"{len(near)} more within the deviations" if near else "beyond the deviations of all others"
    return {"objective": objective, "value": _words(metric), "trial": first, "doubt": doubt if others else ""}


def _ranking(trials: Sequence[Numbered], objective: ObjectiveConfig) -> list[_Ranked]:
    """The best trials by an objective, with places in percent of the range."""
    shown = _having(trials, objective)[:RANKED]
    metrics = [one.result.last[objective.measure] for one in shown]
    ends = [metric.mean + sign * (metric.deviation or 0.0) for metric in metrics for sign in (-1, 1)]
    if len(shown) < 2 or min(ends) == max(ends):
        return []
    low, width = min(ends), (max(ends) - min(ends)) / 100
    return [
        _Ranked(
            one.number, label(one.result), _words(metric), (metric.mean - low) / width,
            (metric.mean - (metric.deviation or 0.0) - low) / width, 2 * (metric.deviation or 0.0) / width,
        )
        for one, metric in zip(shown, metrics, strict=True)
    ]  # fmt: skip


def _columns(
    sweep: Sweep, results: Sequence[TrialResult], missing: Mapping[str, Mapping[str, str]]
) -> list[dict[str, str]]:
    """Columns of the table behind that of the trial: objectives, the state, keys, and all other measures."""
    better = {**KNOWN_METRICS, **{one.measure: one.better for one in sweep.config.objectives}}
    return [
        {"name": name, "title": title, "better": better.get(name, "") if kind == "measure" else ""}
        for kind, name, title in _cells(sweep, results, missing)
    ]


def _cells(
    sweep: Sweep, results: Sequence[TrialResult], missing: Mapping[str, Mapping[str, str]]
) -> list[tuple[str, str, str]]:
    """Kind, short and full name of each column."""
    objectives = [one.measure for one in sweep.config.objectives]
    names = dict.fromkeys(name for one in results for name in (*one.last, *missing.get(one.name, ())))
    keys = short_names([*sweep.config.sweep])
    return [
        *(("measure", name, name) for name in objectives),
        ("state", "state", "state"),
        *(("key", short, path) for path, short in keys.items()),
        *(("measure", name, name) for name in names if name not in objectives),
    ]


def _rows(
    sweep: Sweep, trials: Sequence[Numbered], missing: Mapping[str, Mapping[str, str]]
) -> list[tuple[Numbered, list[dict[str, Any]]]]:
    """The trials with their cells, each a text, a number to sort by, and whether it is on the front."""
    results = [one.result for one in trials]
    columns = _cells(sweep, results, missing)
    objectives = [one.measure for one in sweep.config.objectives]
    on_front = {one.name for one in front(results, sweep.config.objectives)}
    rows = []
    for one in trials:
        cells: list[dict[str, Any]] = []
        for kind, _, name in columns:
            metric = one.result.last.get(name) if kind == "measure" else None
            if metric is not None:
                marked = name in objectives and one.result.name in on_front
                cells.append({"text": _words(metric), "value": metric.mean, "front": marked, "kind": kind})
                continue
            value = one.result.point.get(name, "")
            text = {
                "measure": missing.get(one.result.name, {}).get(name, ""),
                "state": f"{one.result.state} {one.result.why}".strip(),
                "key": value if isinstance(value, str) else f"{value:.4g}",
            }[kind]
            cells.append({"text": text, "value": value if kind == "key" else "", "front": False, "kind": kind})
        rows.append((one, cells))
    return rows


def _details(sweep: Sweep, one: Numbered) -> dict[str, Any]:
    """Details of one trial: its keys, its objectives at each number of images, and samples of its first seed."""
    result, measures = one.result, [each.measure for each in sweep.config.objectives]
    refused = sweep.refusal(result.point) is not None
    runs = [] if refused else sweep.runs(result.point)
    picture = None
    if runs and result.last and one.number <= _PICTURED and runs[0].storage.is_file(SAMPLES):
        picture = Picture("Samples", "", _part_of(runs[0].storage.read_bytes(SAMPLES)), f"Samples of {one.title}")
    return {
        "number": one.number,
        "words": describe(result.point),
        "state": f"{result.state} {result.why}".strip(),
        "point": result.point,
        "figures": {name: _words(result.last[name]) for name in measures if name in result.last},
        "measures": measures,
        "rungs": [
            (f"{images:,}", [_words(row[name]) if name in row else "" for name in measures])
            for images, row in result.curve.items()
        ],
        "runs": [run.config.name for run in runs],
        "picture": picture,
    }


def _part_of(png: bytes) -> bytes:
    """The upper left part of a picture, as PNG."""
    with Image.open(io.BytesIO(png)) as picture:
        sides = [min(side, _PICTURE_PIXELS) for side in picture.size]
        return png_bytes(picture.convert("RGB").crop((0, 0, *sides)))


def _words(metric: SeedMean) -> str:
    return number(metric.mean) + ("" if metric.deviation is None else f" ± {metric.deviation:.2g}")


def _importances(sweep: Sweep, results: Sequence[TrialResult]) -> list[list[str]]:
    """A row for each key: its name, and for each objective the share of the variance that it explains, in words."""
    rows: dict[str, list[str]] = {}
    for one in importances(sweep, results):
        if one.explained is not None:
            words = f"{one.explained:.0%} (by chance {one.by_chance:.0%}; {one.trials} trials)"
        elif one.trials < FEWEST_RANKED:
            words = f"too few trials ({one.trials} of {FEWEST_RANKED})"
        else:
            words = "can't be told: one value, or one for each trial"
        rows.setdefault(one.path, [one.path]).append(words)
    return list(rows.values())


def _speed_ups(sweep: Sweep, trials: Sequence[Numbered]) -> list[tuple[Numbered, Numbered, str]]:
    """Twins, and how much sooner the aligned one arrives, where that can be said."""
    numbered = {one.result.name: one for one in trials}
    rows = []
    for before, after, found, doubt in speed_ups(sweep, [one.result for one in trials]):
        if doubt is not None:
            words = f"no claim: {doubt}"
        elif found is None:
            words = "never arrives"
        else:
            words = f"{'at least ' if found.at_least else ''}{found.ratio:.2f} times"
        rows.append((numbered[before.name], numbered[after.name], words))
    return rows


def _correlations(correlations: Sequence[RankCorrelation]) -> list[list[str]]:
    """A row for each probe: its name, and its correlation with each distance in words."""
    rows: dict[str, list[str]] = {}
    for one in correlations:
        if one.value is not None:
            words = f"{one.value:+.2f} ({one.trials} trials)"
        elif one.trials < FEWEST_RANKED:
            words = f"too few trials ({one.trials} of {FEWEST_RANKED})"
        else:
            words = f"all {one.trials} trials are equal"
        rows.setdefault(one.probe, [one.probe]).append(words)
    return list(rows.values())
