"""Training curves as small SVG pictures, one scalar each, that take the text colour of the page around them."""

import html
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

_POINTS = 200
"""More points than this are averaged in bins: a long run must not make a large page."""
_SMOOTHING = 0.015
"""Deviation of the Gaussian window of the bold line, as a share of the points."""
_LINE = "#3f87d9"
"""Contrast of at least 3 to 1 with white and with a near-black page."""
_TEXT = "#010203"
"""Stands for the page's text colour until the picture is written."""
_DECADES_FOR_LOG = 2
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "vavae", "font.size": 9, "axes.linewidth": 0.6}
_GROUPS = {
    "losses": r"loss/(?!.*weight)",
    "adaptive weights": r".*weight",
    "optimisation": r"learning_rate|gradient_norm",
    "latent space": r"latent/",
    "throughput": r"images_per_second|.*_wait|forward|backward|optimizer|checkpoint|gpu_memory|flops|model_flop",
    "storage": r"storage/|unreadable_images",
    "others": r"",
}
"""Headings in their order, and how the names begin that belong under them; the first that fits counts."""


@dataclass(frozen=True)
class Curve:
    """One scalar over the images seen.

    Args:
        stage: the job that logged it.
        group: heading under which it belongs.
        name: key of the scalar.
        svg: the picture, an ``<svg>`` element with its text alternative.
    """

    stage: str
    group: str
    name: str
    svg: str


def training_curves(rows: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """A curve for every number in the rows: by stage, then by group, otherwise in order of appearance.

    Args:
        rows: records as in ``metrics.jsonl``, with ``stage``, ``images`` and numbers; of two rows with the same stage
            and images the later one counts. Missing values are bridged, non-finite ones leave a gap; scalars without
            a finite value make no curve.
    """
    series: dict[str, dict[str, dict[float, float]]] = {}
    for row in rows:
        of_stage = series.setdefault(row["stage"], {})
        for name, value in row.items():
            if name not in ("stage", "images") and isinstance(value, (int, float)):
                of_stage.setdefault(name, {})[row["images"]] = value
    return [
        Curve(stage, _group(name), name, svg)
        for stage, of_stage in series.items()
        for name in sorted(of_stage, key=lambda name: [*_GROUPS].index(_group(name)))
        if (svg := _draw(stage, name, of_stage[name])) is not None
    ]


def smooth(values: np.ndarray) -> np.ndarray:
    """Average in a Gaussian window, without lag; NaN stays and lends nothing to its neighbours."""
    position = np.arange(len(values))
    window = np.exp(-0.5 * ((position - position[:, None]) / max(1.0, _SMOOTHING * len(values))) ** 2)
    known = np.isfinite(values)
    smoothed = window @ np.where(known, values, 0.0) / np.maximum(window @ known, np.finfo(float).tiny)
    return np.where(known, smoothed, np.nan)


def _group(name: str) -> str:
    return next(group for group, pattern in _GROUPS.items() if re.match(pattern, name))


def _draw(stage: str, name: str, points: Mapping[float, float]) -> str | None:
    images = np.array(sorted(points), dtype=float)
    values = np.array([points[position] for position in images], dtype=float)
    values[~np.isfinite(values)] = np.nan
    images, values = _binned(images), _binned(values)
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4, 1.9), layout="constrained")
        axes = figure.add_subplot()
        _plot(axes, images, values)
        _scale(axes, finite.min(), finite.max())
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = f"{name} of {stage} over {images[-1]:,.0f} images: from {finite[0]:.4g} to {finite[-1]:.4g}"
    return _inline(buffer.getvalue(), text)


def _plot(axes: Axes, images: np.ndarray, values: np.ndarray) -> None:
    axes.plot(images, values, color=_LINE, alpha=0.35, linewidth=0.8)
    axes.plot(images, smooth(values), color=_LINE, linewidth=1.6, marker="." if len(values) < 3 else None)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_TEXT)
    axes.tick_params(colors=_TEXT, width=0.6)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(color=_TEXT, alpha=0.12, linewidth=0.5)


def _scale(axes: Axes, lowest: float, highest: float) -> None:
    """Logarithmic over decades; a constant gets room around it, or rounding errors would fill the axis."""
    if lowest > 0 and np.log10(highest / lowest) > _DECADES_FOR_LOG:
        axes.set_yscale("log")
    elif highest - lowest < 1e-6 * abs(highest):
        axes.set_ylim(lowest - 0.5 * abs(lowest), highest + 0.5 * abs(highest))


def _binned(values: np.ndarray) -> np.ndarray:
    """At most ``_POINTS`` means of consecutive values; one that is missing makes its mean missing."""
    size = -(-len(values) // _POINTS)
    return np.array([values[start : start + size].mean() for start in range(0, len(values), size)])


def _inline(document: str, text: str) -> str:
    """The bare element of an SVG file: named for readers that cannot see it, its text in the colour of the page."""
    element = document[document.index("<svg") :].replace(_TEXT, "currentColor")
    return element.replace("<svg", f'<svg role="img" aria-label="{html.escape(text)}"', 1)
