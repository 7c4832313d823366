"""The results of a sweep's trials, read from storage, and their comparison."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.stats import spearmanr

from vavae.config import differences
from vavae.runs.config import RunConfig
from vavae.sweep.config import TOKENIZER_METRICS, ObjectiveConfig
from vavae.sweep.pareto import SpeedUp, pareto_front, speed_up
from vavae.sweep.space import Point
from vavae.sweep.sweep import Sweep
from vavae.sweep.trial import State, metrics_by_rung, read_ledger

RECONSTRUCTION, GENERATION = "reconstruction_frechet_distance", "generation_frechet_distance"
ALIGNMENT = "losses.vision_foundation.weight"
FEWEST_RANKED = 4
"""Fewest trials whose ranks are correlated."""


class SeedMean(NamedTuple):
    """Mean of a metric over the seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation between seeds; None of one seed."""

    @staticmethod
    def of(values: Sequence[float]) -> "SeedMean":
        """The mean of the values of the seeds."""
        return SeedMean(fmean(values), stdev(values) if len(values) > 1 else None)


class TrialResult(NamedTuple):
    """State and metrics of one trial."""

    name: str
    point: Point
    state: State
    why: str
    curve: dict[int, dict[str, SeedMean]]
    """Metrics by images seen by the LightningDiT, in rising order."""

    @property
    def last(self) -> dict[str, SeedMean]:
        """Metrics at the end of a finished trial; empty for others, which must not be compared with it."""
        return self.curve[max(self.curve)] if self.state == "finished" and self.curve else {}


def collect(sweep: Sweep) -> list[TrialResult]:
    """Read the results of all trials so far, in the order of the space where it has one."""
    ledger = read_ledger(sweep)
    order = {tuple(point.items()): place for place, point in enumerate(sweep.points())}
    entries = sorted(ledger.items(), key=lambda item: (order.get(tuple(item[1].point.items()), len(order)), item[0]))
    return [TrialResult(name, *entry, curve=_curve(sweep, entry.point)) for name, entry in entries]


def _curve(sweep: Sweep, point: Point) -> dict[int, dict[str, SeedMean]]:
    """The rungs that all seeds have, with the metrics that all have."""
    if sweep.refusal(point) is not None:
        return {}
    found = [metrics_by_rung(run) for run in sweep.runs(point)]
    shared = sorted(set.intersection(*map(set, found)))
    curve = {}
    for images in shared:
        rows = [rungs[images] for rungs in found]
        names = [name for name in rows[0] if all(name in row for row in rows)]
        curve[images] = {name: SeedMean.of([row[name] for row in rows]) for name in names}
    return curve


def front(results: Sequence[TrialResult], objectives: Sequence[ObjectiveConfig]) -> list[TrialResult]:
    """Select the finished trials on the Pareto front of the objectives."""
    finished = [one for one in results if all(objective.measure in one.last for objective in objectives)]
    costs = [[_cost(one, objective) for objective in objectives] for one in finished]
    return [one for one, on in zip(finished, pareto_front(costs), strict=True) if on]


def _cost(one: TrialResult, objective: ObjectiveConfig) -> float:
    """The value of an objective, negated where higher is better."""
    value = one.last[objective.measure].mean
    return -value if objective.better == "higher" else value


def metric_curve(one: TrialResult, metric: str) -> dict[int, SeedMean]:
    """One metric by images seen by the LightningDiT."""
    return {images: row[metric] for images, row in one.curve.items() if metric in row}


def is_aligned(sweep: Sweep, one: TrialResult) -> bool:
    """Return whether a trial's tokenizer learns from the teacher in any phase."""
    return any(phase.losses.vision_foundation.weight > 0 for phase in _config(sweep, one).tokenizer_phases())


def twins(sweep: Sweep, results: Sequence[TrialResult]) -> list[tuple[TrialResult, TrialResult]]:
    """Pair every unaligned trial with each aligned one that differs from it by the weight of the alignment alone."""
    configs = [_config(sweep, one) for one in results]
    return [
        (before, after)
        for before, mine in zip(results, configs, strict=True)
        if not is_aligned(sweep, before)
        for after, theirs in zip(results, configs, strict=True)
        if [path for path, *_ in differences(mine, theirs)] == [ALIGNMENT]
    ]


class TwinSpeedUp(NamedTuple):
    """Speed-up of an aligned trial in generating as well as its unaligned twin does at the end."""

    before: TrialResult
    after: TrialResult
    found: SpeedUp | None
    """None where the aligned one never comes as far."""
    doubt: str | None
    """Reason why seeds and trend allow no claim; None where they do."""


def speed_ups(sweep: Sweep, results: Sequence[TrialResult]) -> list[TwinSpeedUp]:
    """Speed-ups of all twins whose distances are known after several numbers of images."""
    found = []
    for before, after in twins(sweep, [one for one in results if one.last]):
        slow, fast = (metric_curve(one, GENERATION) for one in (before, after))
        if len(slow) > 1 and len(fast) > 1:
            means = ({images: metric.mean for images, metric in curve.items()} for curve in (slow, fast))
            found.append(TwinSpeedUp(before, after, speed_up(*means), _doubt(slow, fast)))
    return found


def _doubt(slow: dict[int, SeedMean], fast: dict[int, SeedMean]) -> str | None:
    """Reason to claim no speed-up: one seed, distances that do not fall, or twins as far apart as seeds are."""
    first, last, twin = slow[min(slow)], slow[max(slow)], fast[max(fast)]
    if first.deviation is None or last.deviation is None or twin.deviation is None:
        return "one seed"
    if first.mean - last.mean <= first.deviation + last.deviation:
        return "the unaligned one has hardly learned: its distance falls by no more than seeds deviate"
    if abs(last.mean - twin.mean) <= last.deviation + twin.deviation:
        return "both end within the deviations between seeds"
    return None


class Importance(NamedTuple):
    """Share of the variance of an objective between trials that one key explains by itself."""

    path: str
    measure: str
    trials: int
    """Finished trials that set the key."""
    explained: float | None
    """0 to 1: of options the variance between their means, of a range the square of the rank correlation. None of fewer
    than `FEWEST_RANKED` trials, of one value, or where every trial has a value of its own among the options."""
    by_chance: float | None
    """Share that a key without any effect is expected to explain."""


def importances(sweep: Sweep, results: Sequence[TrialResult]) -> list[Importance]:
    """The importance of every key for every objective, one key at a time; keys that vary together share theirs."""
    return [
        _importance(path, objective.measure, domain.range is not None, results)
        for path, domain in sweep.config.sweep.items()
        for objective in sweep.config.objectives
    ]


def _importance(path: str, measure: str, is_range: bool, results: Sequence[TrialResult]) -> Importance:
    pairs = [(one.point[path], one.last[measure].mean) for one in results if path in one.point and measure in one.last]
    values, figures = [value for value, _ in pairs], [figure for _, figure in pairs]
    total = sum((figure - fmean(figures)) ** 2 for figure in figures)
    degrees = 1 if is_range else len({*values}) - 1
    if len(pairs) < FEWEST_RANKED or total == 0 or not 0 < degrees < len(pairs) - 1 or len({*values}) == 1:
        return Importance(path, measure, len(pairs), None, None)
    if is_range:
        explained = float(spearmanr(pairs).statistic) ** 2
    else:
        groups = [[figure for other, figure in pairs if other == value] for value in {*values}]
        explained = sum(len(group) * (fmean(group) - fmean(figures)) ** 2 for group in groups) / total
    return Importance(path, measure, len(pairs), explained, degrees / (len(pairs) - 1))


class RankCorrelation(NamedTuple):
    """Spearman's correlation of a probe of the tokenizer with a distance of generated images."""

    probe: str
    distance: str
    trials: int
    """Finished trials that have both; several seeds are one, by their mean."""
    value: float | None
    """-1 to 1; None of fewer than `FEWEST_RANKED` trials, or where all have one value of either."""


def rank_correlations(results: Sequence[TrialResult]) -> list[RankCorrelation]:
    """Correlate all that is known before a diffusion model is trained with the final distances of generated images."""
    names = dict.fromkeys(name for one in results for name in one.last)
    further = (f"{RECONSTRUCTION}_", "density_")
    found = []
    for probe in (name for name in names if name in TOKENIZER_METRICS or name.startswith(further)):
        for distance in (name for name in names if name.startswith(GENERATION)):
            pairs = ranked(results, probe, distance)
            varied = len(pairs) >= FEWEST_RANKED and all(len(set(values)) > 1 for values in zip(*pairs, strict=True))
            value = float(spearmanr(pairs).statistic) if varied else None
            found.append(RankCorrelation(probe, distance, len(pairs), value))
    return found


def ranked(results: Sequence[TrialResult], probe: str, distance: str) -> list[tuple[float, float]]:
    """Means of a probe and a distance, of the finished trials that have both."""
    return [(one.last[probe].mean, one.last[distance].mean) for one in results if {probe, distance} <= one.last.keys()]


def _config(sweep: Sweep, one: TrialResult) -> RunConfig:
    return sweep.run_config(one.point, sweep.config.seeds[0])
