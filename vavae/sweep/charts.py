"""Charts of a sweep for its page: the frontier, generation against images seen, and trials across their keys."""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from vavae.report.chart import (
    COLORS,
    NARROW,
    TALL,
    WIDE,
    Axis,
    Coordinate,
    Dot,
    Line,
    line_chart,
    look,
    parallel_chart,
    scatter_chart,
)
from vavae.report.html import number
from vavae.sweep.config import DomainConfig, ObjectiveConfig
from vavae.sweep.pareto import pareto_front
from vavae.sweep.plots import label
from vavae.sweep.sweep import Sweep
from vavae.sweep.trial_results import (
    GENERATION,
    RECONSTRUCTION,
    RankCorrelation,
    SeedMean,
    TrialResult,
    is_aligned,
    metric_curve,
    twins,
)

_MOST_WORDS = 12
"""Points of more trials than this bear no words, which would overlap."""
_TICK_CHARACTERS, _NAME_CHARACTERS = 14, 28
_UNSET = "not set"


class Chart(NamedTuple):
    """A chart with the words around it."""

    svg: Markup
    vertical: str = ""
    horizontal: str = ""
    key: str = ""


class Numbered(NamedTuple):
    """A trial with its number on the page."""

    number: int
    result: TrialResult

    @property
    def title(self) -> str:
        """The trial in a line."""
        return f"trial {self.number} · {label(self.result)}"


def frontier_chart(sweep: Sweep, trials: Sequence[Numbered]) -> Chart | None:
    """Draw reconstruction against generation with deviations, the front, and arrows from unaligned trials to twins.

    Trials of one tokenizer make none.
    """
    shown = [one for one in trials if {RECONSTRUCTION, GENERATION} <= one.result.last.keys()]
    if len({one.result.last[RECONSTRUCTION].mean for one in shown}) < 2:
        return None
    dots = {
        one.result.name: _dot(
            one, one.result.last[RECONSTRUCTION], one.result.last[GENERATION], is_aligned(sweep, one.result),
            label(one.result) if len(shown) <= _MOST_WORDS else "",
        )
        for one in shown
    }  # fmt: skip
    points = [(dot.x, dot.y) for dot in dots.values()]
    svg = scatter_chart(
        [*dots.values()],
        f"{GENERATION} over {RECONSTRUCTION} of {len(shown)} trials",
        _axis_of([one.result.last[RECONSTRUCTION] for one in shown]),
        _axis_of([one.result.last[GENERATION] for one in shown]),
        WIDE,
        sorted(point for point, on in zip(points, pareto_front(points), strict=True) if on),
        [(dots[before.name], dots[after.name]) for before, after in twins(sweep, [one.result for one in shown])],
    )
    key = (
        "Blue and filled: aligned with the teacher; orange and open: not. An arrow leads to a trial that differs by "
        "the weight of the alignment alone. Numbers are those of the trials below. Dotted: the front."
    )
    return Chart(svg, f"↑ {GENERATION}, lower is better", f"{RECONSTRUCTION}, lower is better →", key + _bars(sweep))


def curves_chart(sweep: Sweep, trials: Sequence[Numbered]) -> Chart | None:
    """Draw the distance of generated images against images seen by the LightningDiT."""
    shown = [(one, curve) for one in trials if len(curve := metric_curve(one.result, GENERATION)) > 1]
    if not shown:
        return None
    lines = []
    for one, curve in shown:
        color, dashes = look(one.number - 1)
        deviations = [metric.deviation or 0.0 for metric in curve.values()]
        means = [metric.mean for metric in curve.values()]
        lines.append(Line(one.title, [*curve], means, color, dashes, deviations=deviations, trial=one.number))
    svg = line_chart(
        lines,
        f"{GENERATION} of each trial over the images that its LightningDiT has seen",
        Axis.at(images for line in lines for images in line.x),
        _axis_of([metric for _, curve in shown for metric in curve.values()]),
        WIDE,
    )
    return Chart(
        svg,
        f"↑ {GENERATION}, lower is better",
        "images seen by the LightningDiT →",
        "Numbers are those of the trials." + _bars(sweep),
    )


def sensitivity_charts(sweep: Sweep, trials: Sequence[Numbered]) -> dict[str, list[Chart]]:
    """Draw each objective against each key: every finished trial that sets it."""
    drawn: dict[str, list[Chart]] = {}
    for path, domain in sweep.config.sweep.items():
        for objective in sweep.config.objectives:
            shown = [one for one in trials if path in one.result.point and objective.measure in one.result.last]
            if shown:
                means = [one.result.last[objective.measure] for one in shown]
                x = _axis_of_domain(domain, 80 // max(1, len(domain.options)))
                dots = [
                    _dot(one, SeedMean(_place(domain, one.result.point[path]), None), mean, True)
                    for one, mean in zip(shown, means, strict=True)
                ]
                svg = scatter_chart(dots, f"{objective.measure} over {path}", x, _axis_of(means), TALL)
                drawn.setdefault(path, []).append(Chart(svg, f"{objective.measure}, {objective.better} is better"))
    return drawn


def parallel_trials(sweep: Sweep, trials: Sequence[Numbered]) -> Chart | None:
    """Draw finished trials as lines across their keys and objectives, the best by the first objective blue."""
    objectives, domains = sweep.config.objectives, sweep.config.sweep
    shown = [one for one in trials if all(objective.measure in one.result.last for objective in objectives)]
    if len(shown) < 2:
        return None
    figures = {each.measure: [one.result.last[each.measure].mean for one in shown] for each in objectives}
    axes = {path: _axis_of_domain(domain, _TICK_CHARACTERS, unset=True) for path, domain in domains.items()}
    axes |= {measure: Axis.of(values) for measure, values in figures.items()}
    lines = []
    for place, one in enumerate(shown):
        values = [
            _place(domain, one.result.point[path]) if path in one.result.point else axes[path].low
            for path, domain in domains.items()
        ]
        color = _between(_share_behind(figures[objectives[0].measure], place, objectives[0]))
        values += [figures[each.measure][place] for each in objectives]
        lines.append(Line(one.title, range(len(values)), values, color, trial=one.number))
    names = {path: path.rpartition(".")[2] for path in axes}
    coordinates = [
        Coordinate(name if len(name) <= _NAME_CHARACTERS else f"{name[: _NAME_CHARACTERS - 1]}…", axes[path])
        for path, name in names.items()
    ]
    return Chart(
        parallel_chart(coordinates, lines, f"{len(shown)} trials across {', '.join(axes)}"),
        key=f"A line is a trial: blue are the best by {objectives[0].measure}, orange the last. At the foot of an axis "
        "a key is not set.",
    )


def probe_charts(trials: Sequence[Numbered], correlations: Sequence[RankCorrelation]) -> list[Chart]:
    """Draw the distance of generated images against each probe of the tokenizer whose ranks are correlated with it."""
    drawn = []
    for each in correlations:
        if each.distance == GENERATION and each.value is not None:
            shown = [one for one in trials if {each.probe, GENERATION} <= one.result.last.keys()]
            x, y = ([one.result.last[name] for one in shown] for name in (each.probe, GENERATION))
            dots = [_dot(*given, True) for given in zip(shown, x, y, strict=True)]
            svg = scatter_chart(dots, f"{GENERATION} over {each.probe}", _axis_of(x), _axis_of(y), NARROW)
            drawn.append(Chart(svg, each.probe, f"{each.value:+.2f} ({each.trials} trials)"))
    return drawn


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Keys by the shortest of their ends that no other has."""
    ends = [path.rpartition(".")[2] for path in paths]
    return {path: end if ends.count(end) == 1 else path for path, end in zip(paths, ends, strict=True)}


def _dot(one: Numbered, x: SeedMean, y: SeedMean, filled: bool, words: str = "") -> Dot:
    title = f"{one.title}; {', '.join(number(metric.mean) for metric in (x, y))}"
    return Dot(
        one.number, x.mean, y.mean, title, COLORS[0 if filled else 1], not filled, x.deviation, y.deviation, words
    )  # fmt: skip


def _axis_of(metrics: Sequence[SeedMean]) -> Axis:
    ends = [metric.mean + sign * (metric.deviation or 0.0) for metric in metrics for sign in (-1, 1)]
    return Axis.of(ends, margin=0.1)


def _axis_of_domain(domain: DomainConfig, characters: int, unset: bool = False) -> Axis:
    """Axis of a key; where some trials do not set it, its low end is theirs."""
    if domain.range is not None:
        return Axis.of(domain.range, log=domain.loguniform is not None)
    names = [name if len(name) <= characters else f"{name[: characters - 1]}…" for name in domain.options]
    axis = Axis.named(names)
    return axis._replace(ticks=((axis.low, _UNSET), *axis.ticks)) if unset and domain.when else axis


def _place(domain: DomainConfig, value: str | float) -> float:
    return float(value) if domain.range is not None else list(domain.options).index(str(value))


def _share_behind(values: Sequence[float], place: int, objective: ObjectiveConfig) -> float:
    """Place of a trial in the ranking, 0 for the best to 1 for the worst."""
    better = sum(other > values[place] if objective.better == "higher" else other < values[place] for other in values)
    return better / (len(values) - 1)


def _between(share: float) -> str:
    """Color between those of the best and of the worst."""
    ends = [[int(color[at : at + 2], 16) for at in (1, 3, 5)] for color in COLORS[:2]]
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(*ends, strict=True))


def _bars(sweep: Sweep) -> str:
    return "" if len(sweep.config.seeds) == 1 else " Bars are deviations between seeds."
