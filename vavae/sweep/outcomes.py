"""The outcomes of a sweep's trials, as storage has them, and how they compare."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from vavae.config import differences
from vavae.runs.config import RunConfig
from vavae.sweep.config import ObjectiveConfig
from vavae.sweep.pareto import SpeedUp, pareto_front, speed_up
from vavae.sweep.space import Point
from vavae.sweep.sweep import Sweep
from vavae.sweep.trial import State, read_ledger, rungs_of

RECONSTRUCTION, GENERATION = "reconstruction_frechet_distance", "generation_frechet_distance"
ALIGNMENT = "losses.vision_foundation.weight"


class Figure(NamedTuple):
    """A measure over the seeds."""

    mean: float
    deviation: float | None
    """Between seeds, of a sample; None of one seed."""

    @staticmethod
    def of(values: Sequence[float]) -> "Figure":
        """From the value of each seed."""
        return Figure(fmean(values), stdev(values) if len(values) > 1 else None)


class Outcome(NamedTuple):
    """What is known of one trial."""

    name: str
    point: Point
    state: State
    why: str
    curve: dict[int, dict[str, Figure]]
    """Measures by the images that the LightningDiT had seen, in rising order."""

    @property
    def last(self) -> dict[str, Figure]:
        """The measures at the end of a finished trial; nothing of others, which are not to be compared with it."""
        return self.curve[max(self.curve)] if self.state == "finished" and self.curve else {}


def collect(sweep: Sweep) -> list[Outcome]:
    """The outcomes of all trials so far, as storage has them, in the order of the space where it has one."""
    ledger = read_ledger(sweep)
    order = {tuple(point.items()): place for place, point in enumerate(sweep.points())}
    entries = sorted(ledger.items(), key=lambda item: (order.get(tuple(item[1].point.items()), len(order)), item[0]))
    return [Outcome(name, *entry, curve=_curve(sweep, entry.point)) for name, entry in entries]


def _curve(sweep: Sweep, point: Point) -> dict[int, dict[str, Figure]]:
    """The rungs that all seeds have, with the measures that all have."""
    if sweep.refusal(point) is not None:
        return {}
    found = [rungs_of(run) for run in sweep.runs(point)]
    shared = sorted(set.intersection(*map(set, found)))
    curve = {}
    for images in shared:
        rows = [rungs[images] for rungs in found]
        names = [name for name in rows[0] if all(name in row for row in rows)]
        curve[images] = {name: Figure.of([row[name] for row in rows]) for name in names}
    return curve


def front(outcomes: Sequence[Outcome], objectives: Sequence[ObjectiveConfig]) -> list[Outcome]:
    """The finished trials that no other one beats in all objectives."""
    finished = [one for one in outcomes if all(objective.measure in one.last for objective in objectives)]
    costs = [[cost(one.last, objective) for objective in objectives] for one in finished]
    return [one for one, on in zip(finished, pareto_front(costs), strict=True) if on]


def cost(measures: Mapping[str, Figure], objective: ObjectiveConfig) -> float:
    """An objective as something that is to be low."""
    value = measures[objective.measure].mean
    return -value if objective.better == "higher" else value


def curve_of(one: Outcome, measure: str) -> dict[int, Figure]:
    """One measure by the images that the LightningDiT had seen."""
    return {images: row[measure] for images, row in one.curve.items() if measure in row}


def is_aligned(sweep: Sweep, one: Outcome) -> bool:
    """Whether a trial's tokenizer learns from the teacher in any stage."""
    return any(stage.losses.vision_foundation.weight > 0 for stage in _config(sweep, one).tokenizer_phases())


def twins(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[tuple[Outcome, Outcome]]:
    """Every unaligned trial with each aligned one that differs from it by the weight of the alignment alone."""
    configs = [_config(sweep, one) for one in outcomes]
    return [
        (before, after)
        for before, mine in zip(outcomes, configs, strict=True)
        if not is_aligned(sweep, before)
        for after, theirs in zip(outcomes, configs, strict=True)
        if [path for path, *_ in differences(mine, theirs)] == [ALIGNMENT]
    ]


def speed_ups(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[tuple[Outcome, Outcome, SpeedUp | None]]:
    """How much sooner the aligned twin generates as well as its unaligned one does at the end."""
    found = []
    for before, after in twins(sweep, [one for one in outcomes if one.last]):
        slow, fast = (
            {images: figure.mean for images, figure in curve_of(one, GENERATION).items()} for one in (before, after)
        )
        if len(slow) > 1 and len(fast) > 1:
            found.append((before, after, speed_up(slow, fast)))
    return found


def _config(sweep: Sweep, one: Outcome) -> RunConfig:
    return sweep.run_config(one.point, sweep.config.seeds[0])
