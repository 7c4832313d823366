"""The results of a sweep as files: the table, the best configurations, the picture of the frontier, and the page."""

import csv
import io
from collections.abc import Sequence

from vavae.config.load import dump
from vavae.evaluation.convergence import convergence_names
from vavae.sweep.page import sweep_page
from vavae.sweep.plots import frontier_png, probes_png, ranking_png
from vavae.sweep.sweep import Sweep
from vavae.sweep.trial_results import RankCorrelation, TrialResult, collect, front, rank_correlations

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
    files |= {name: png for name, png in drawn.items() if png is not None}
    files[FRONTIER] = sweep_page(sweep, results, correlations, _missing(sweep, results), best).encode()
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


def _missing(sweep: Sweep, results: Sequence[TrialResult]) -> dict[str, dict[str, str]]:
    """Words for the metrics that finished trials were asked for and do not have, by trial."""
    asked = {one.name: _convergence_names(sweep, one) for one in results if one.last}
    missed = _not_reached(sweep)
    return {one.name: {name: missed for name in asked[one.name] if name not in one.last} for one in results if one.last}
