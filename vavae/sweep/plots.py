"""Pictures of a sweep for documents, as PNG: the frontier, the ranking of trials, and probes of tokenizers."""

import io
import math
from collections.abc import Sequence

import vavae.matplotlib_compat  # noqa: F401  (before matplotlib)

# isort: split
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vavae.sweep.config import ObjectiveConfig
from vavae.sweep.pareto import pareto_front
from vavae.sweep.sweep import Sweep
from vavae.sweep.trial_results import (
    GENERATION,
    RECONSTRUCTION,
    RankCorrelation,
    TrialResult,
    is_aligned,
    ranked,
    twins,
)

_DPI = 130
_ALIGNED, _UNALIGNED, _FRONT = "#3f87d9", "#d9733f", "#7a7a7a"
_LABEL_CHARACTERS = 40
RANKED = 30
"""Trials that a ranking shows at most."""
_PROBE_COLUMNS = 4


def frontier_png(sweep: Sweep, results: Sequence[TrialResult]) -> bytes | None:
    """Plot reconstruction against generation with error bars, the front, and arrows from unaligned trials to twins."""
    shown = [one for one in results if {RECONSTRUCTION, GENERATION} <= one.last.keys()]
    if not shown:
        return None
    figure = Figure(figsize=(8, 5.5), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    for one in shown:
        x, y = one.last[RECONSTRUCTION], one.last[GENERATION]
        aligned = is_aligned(sweep, one)
        axes.errorbar(
            x.mean, y.mean, xerr=x.deviation, yerr=y.deviation, marker="o", capsize=3,
            color=_ALIGNED if aligned else _UNALIGNED, markerfacecolor=None if aligned else "white",
        )  # fmt: skip
        axes.annotate(label(one), (x.mean, y.mean), textcoords="offset points", xytext=(7, 5), fontsize=7)
    for before, after in twins(sweep, shown):
        tail, head = ((one.last[RECONSTRUCTION].mean, one.last[GENERATION].mean) for one in (before, after))
        axes.annotate("", head, tail, arrowprops={"arrowstyle": "->", "color": _FRONT, "shrinkA": 6, "shrinkB": 6})
    _draw_front(axes, shown)
    axes.set_xlabel("reconstruction: Fréchet distance (lower is better)")
    axes.set_ylabel("generation: Fréchet distance (lower is better)")
    axes.margins(0.15)
    return _png(figure)


def ranking_png(results: Sequence[TrialResult], objectives: Sequence[ObjectiveConfig]) -> bytes | None:
    """Plot the objectives of the finished trials with their deviations between seeds, the best by the first on top."""
    first = objectives[0]
    shown = [one for one in results if all(objective.measure in one.last for objective in objectives)]
    shown.sort(key=lambda one: one.last[first.measure].mean, reverse=first.better == "higher")
    shown = shown[:RANKED]
    if len(shown) < 2:
        return None
    figure = Figure(figsize=(3 + 3 * len(objectives), 1 + 0.3 * len(shown)), dpi=_DPI, layout="constrained")
    panels = figure.subplots(1, len(objectives), squeeze=False, sharey=True)[0]
    for axes, objective in zip(panels, objectives, strict=True):
        metrics = [one.last[objective.measure] for one in shown]
        axes.errorbar(
            [metric.mean for metric in metrics], range(len(shown)), xerr=[metric.deviation or 0 for metric in metrics],
            fmt="o", color=_ALIGNED, markersize=5, capsize=3,
        )  # fmt: skip
        axes.set_xlabel(f"{objective.measure} ({objective.better} is better)", fontsize=8)
        axes.grid(axis="y", color=_FRONT, alpha=0.2)
        axes.margins(y=0.5 / len(shown))
    panels[0].set_yticks(range(len(shown)), [label(one) for one in shown], fontsize=8)
    panels[0].invert_yaxis()
    return _png(figure)


def probes_png(results: Sequence[TrialResult], correlations: Sequence[RankCorrelation]) -> bytes | None:
    """Plot the distance of generated images against each probe of the tokenizer whose ranks are correlated with it."""
    shown = [one for one in correlations if one.distance == GENERATION and one.value is not None]
    if not shown:
        return None
    columns = min(_PROBE_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(2.6 * columns, 2.2 * rows), dpi=_DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, one in zip(panels.flat[: len(shown)], shown, strict=True):
        axes.plot(*zip(*ranked(results, one.probe, one.distance), strict=True), "o", color=_ALIGNED, markersize=4)
        axes.set_title(f"{one.value:+.2f} ({one.trials} trials)", fontsize=7)
        axes.set_xlabel(one.probe, fontsize=7)
        axes.tick_params(labelsize=6)
    for axes in panels.flat[len(shown) :]:
        axes.remove()
    figure.supylabel("generation: Fréchet distance (lower is better)", fontsize=7)
    return _png(figure)


def label(one: TrialResult) -> str:
    """Label of a trial: the values that it sets, shortened."""
    words = " ".join(value if isinstance(value, str) else f"{value:.3g}" for value in one.point.values())
    return words if len(words) <= _LABEL_CHARACTERS else f"{words[: _LABEL_CHARACTERS - 1]}…"


def _draw_front(axes: Axes, shown: Sequence[TrialResult]) -> None:
    """Draw the Pareto front as a staircase."""
    points = [(one.last[RECONSTRUCTION].mean, one.last[GENERATION].mean) for one in shown]
    front = sorted(point for point, on in zip(points, pareto_front(points), strict=True) if on)
    axes.plot(*zip(*front, strict=True), drawstyle="steps-post", color=_FRONT, linewidth=1, linestyle=":", zorder=0)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
