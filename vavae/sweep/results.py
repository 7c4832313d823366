"""The results of a sweep as files: the table, the best configurations, the picture of the frontier, and the page."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vavae.config.load import dump
from vavae.config.yaml_source import to_text
from vavae.evaluation.convergence import convergence_names
from vavae.report.figures import Picture
from vavae.report.html import number, page
from vavae.sweep.plots import curves_png, frontier_png, probes_png, ranking_png, sensitivity_png
from vavae.sweep.sweep import Sweep, as_written, describe
from vavae.sweep.trial_results import (
    FEWEST_RANKED,
    GENERATION,
    RECONSTRUCTION,
    RankCorrelation,
    TrialResult,
    collect,
    front,
    rank_correlations,
    speed_ups,
)

FRONTIER, _TABLE, _PROBES, _BEST = "frontier.html", "trials.csv", "probes.csv", "best"
_FRONTIER_PICTURE, _RANKING_PICTURE, _PROBES_PICTURE = "frontier.png", "ranking.png", "probes.png"


def write_sweep(sweep: Sweep) -> None:
    """Write the results of a sweep so far: tables, best configurations, pictures and page."""
    results = collect(sweep)
    correlations = rank_correlations(results)
    files = {_TABLE: table_csv(sweep, results).encode(), _PROBES: probes_csv(correlations).encode()}
    best = _write_best(sweep, results)
    drawn = {
        _FRONTIER_PICTURE: frontier_png(sweep, results),
        _RANKING_PICTURE: ranking_png(results, sweep.config.objectives),
        _PROBES_PICTURE: probes_png(results, correlations),
    }
    pictures = {name: png or b"" for name, png in drawn.items()}
    files |= {name: png for name, png in pictures.items() if png}
    files[FRONTIER] = _page(sweep, results, correlations, pictures, best).encode()
    for name, data in files.items():
        sweep.storage.write_bytes(name, data)


def table_csv(sweep: Sweep, results: Sequence[TrialResult]) -> str:
    """Table as CSV: a row for each trial and rung with its point, all metrics, and whether it is on the front."""
    asked = {one.name: _convergence_names(sweep, one) for one in results}
    names = [name for one in results for row in one.curve.values() for name in row]
    metrics = list(dict.fromkeys([*names, *(name for names in asked.values() for name in names)]))
    best = [one.name for one in front(results, sweep.config.objectives)]
    columns = ["trial", "state", "why", *sweep.config.sweep, "seeds", "images_seen", "on_front"]
    columns += [name for metric in metrics for name in (metric, f"{metric}_deviation")]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for one in results:
        known = {"trial": one.name, "state": one.state, "why": one.why, "seeds": len(sweep.config.seeds), **one.point}
        for images, row in one.curve.items() or [("", {})]:
            ends = one.state == "finished" and images == max(one.curve)
            values = {
                name: value
                for metric, found in row.items()
                for name, value in ((metric, found.mean), (f"{metric}_deviation", found.deviation))
            }
            missed = dict.fromkeys(asked[one.name] if row else (), _not_reached(sweep))
            writer.writerow({**known, "images_seen": images, "on_front": ends and one.name in best, **missed, **values})
    return text.getvalue()


def probes_csv(correlations: Sequence[RankCorrelation]) -> str:
    """Rank correlations as CSV: a row for each probe and distance; the value is empty where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["probe", "distance", "trials", "rank_correlation"])
    writer.writerows([one.probe, one.distance, one.trials, one.value] for one in correlations)
    return text.getvalue()


def _convergence_names(sweep: Sweep, one: TrialResult) -> list[str]:
    """Names of the metrics of a trial that are missing where a Fréchet distance was not reached with every seed."""
    if sweep.refusal(one.point) is not None:
        return []
    thresholds = sweep.run_config(one.point, sweep.config.seeds[0]).evaluate.frechet_thresholds
    return [name for threshold in thresholds for name in convergence_names(threshold)]


def _not_reached(sweep: Sweep) -> str:
    """Entry of such a metric."""
    return "not reached" if len(sweep.config.seeds) == 1 else "not reached with every seed"


def _write_best(sweep: Sweep, results: Sequence[TrialResult]) -> list[str]:
    """Write a configuration at full size for every trial on the front: `best.yaml`, or `best/<trial>.yaml` each.

    Returns:
        The names of the files.
    """
    chosen = {
        f"{_BEST}.yaml" if len(sweep.config.objectives) == 1 else f"{_BEST}/{one.name}.yaml": one
        for one in front(results, sweep.config.objectives)
    }
    for old in sweep.storage.list(_BEST):
        if old not in chosen:
            sweep.storage.delete(old)
    for name, one in chosen.items():
        sweep.storage.write_bytes(name, dump(sweep.full_config(one.point)).encode())
    return list(chosen)


def _page(
    sweep: Sweep,
    results: Sequence[TrialResult],
    correlations: Sequence[RankCorrelation],
    pictures: Mapping[str, bytes],
    best: Sequence[str],
) -> str:
    """Page of a sweep, as HTML."""
    states = [one.state for one in results]
    summary = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    shown = {}
    for one in results:
        asked = _convergence_names(sweep, one) if one.last else []
        shown[one.name] = {
            name: number(metric.mean) + ("" if metric.deviation is None else f" ± {metric.deviation:.2g}")
            for name, metric in one.last.items()
        }
        shown[one.name] |= {name: _not_reached(sweep) for name in asked if name not in one.last}
    measures = list(dict.fromkeys(name for of_trial in shown.values() for name in of_trial))
    return page(
        "sweep/frontier.html",
        title=sweep.config.name,
        summary=f"A sweep; trials: {summary}" if states else "A sweep that has not begun",
        pictures=_pictures(sweep, results, pictures),
        measures=measures,
        trials=[
            [describe(one.point), f"{one.state} {one.why}", *(shown[one.name].get(name, "") for name in measures)]
            for one in results
        ],
        generation=GENERATION,
        speed_ups=_speed_ups(sweep, results),
        distances=list(dict.fromkeys(one.distance for one in correlations)),
        correlations=_correlations(correlations),
        facts={
            "storage": sweep.storage.url(),
            "seeds": ", ".join(map(str, sweep.config.seeds)),
            "objectives": ", ".join(f"{one.measure} ({one.better} is better)" for one in sweep.config.objectives),
            "best": ", ".join(best),
        },
        config=to_text(as_written(sweep)),
    )


def _speed_ups(sweep: Sweep, results: Sequence[TrialResult]) -> list[list[str]]:
    """Twins, and how much sooner the aligned one arrives."""
    rows = []
    for before, after, found in speed_ups(sweep, results):
        ratio = "never arrives" if found is None else f"{'at least ' if found.at_least else ''}{found.ratio:.2f} times"
        rows.append([describe(before.point), describe(after.point), ratio])
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


def _pictures(sweep: Sweep, results: Sequence[TrialResult], pictures: Mapping[str, bytes]) -> list[Picture]:
    drawn = [
        Picture(
            "Frontier",
            "Filled: aligned with the teacher; open: not. An arrow leads to a trial that differs by the weight of the "
            "alignment alone. Bars are deviations between seeds; dotted is the front.",
            pictures[_FRONTIER_PICTURE],
            f"{GENERATION} over {RECONSTRUCTION} of {len(results)} trials",
        ),
        Picture(
            "Ranking",
            "Finished trials. Bars are deviations between seeds.",
            pictures[_RANKING_PICTURE],
            "Objectives by trial, the best by the first on top",
        ),
        Picture(
            "Generation against images seen",
            "Dashed: not aligned. Bars are deviations between seeds.",
            curves_png(sweep, results) or b"",
            f"{GENERATION} of each trial over the images that its LightningDiT has seen",
        ),
        Picture(
            "Cheap probes",
            "Finished trials, by what is known before a LightningDiT is trained; Spearman's correlation of the ranks.",
            pictures[_PROBES_PICTURE],
            f"{GENERATION} over each probe of the tokenizer",
        ),
    ]
    for path, domain in sweep.config.sweep.items():
        png = sensitivity_png(path, domain, results, sweep.config.objectives)
        drawn.append(Picture(path, "Finished trials; the line joins means.", png or b"", f"Objectives over {path}"))
    return [replace(one, smooth=True) for one in drawn if one.png]
