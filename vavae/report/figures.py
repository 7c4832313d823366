"""Figures of a report: pictures, training curves, and the map of the latent space.

Curves are small SVG pictures, one scalar each, that take the text color of the page around them.
"""

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

import vavae.matplotlib_compat  # noqa: F401  (before matplotlib)

# isort: split
import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from vavae.metrics.latent_space import LatentMap
from vavae.training.logging.metric_names import metric_info

_POINTS = 200
"""More points than this are averaged in bins: a long run must not make a large page."""
_SMOOTHING = 0.015
"""Deviation of the Gaussian window of the bold line, as a share of the points."""
_TEXT = "#010203"
"""Stands for the page's text color until the picture is written."""
_DECADES_FOR_LOG = 2
_COLORS = ("#3f87d9", "#d2691e", "#2f9e68", "#b95fb0")
"""Contrast of at least 3 to 1 with white and with a near-black page; distinguishable to the color-blind."""
_DASHES = ("", "6 2.5", "1.5 2", "7 2 1.5 2")
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "vavae", "font.size": 9, "axes.linewidth": 0.6}
_MAP_COLORS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.15, 0.9, 256)))
"""Without its ends, one of which would be lost on a dark page and the other on a light one."""
_MAP_INCHES, _MAP_DPI = 5, 144
_MAP_AREA = 20_000
"""Area of all points of a map together, square points; few are drawn large."""
_GROUPS = {
    "losses": r"loss/(?!.*weight)",
    "generation": r"generation_|inception_score",
    "adaptive weights": r".*weight",
    "optimization": r"learning_rate|gradient_norm",
    "latent space": r"latent/|equivariance_error/",
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
        meaning: what the scalar is, where that is known.
    """

    stage: str
    group: str
    name: str
    svg: Markup
    meaning: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture with its explanation; ``alt`` says in words what is to be seen, ``smooth`` that it is no pixels."""

    title: str
    caption: str
    png: bytes
    alt: str
    smooth: bool = False

    @property
    def source(self) -> str:
        """The picture itself, as a URL."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def training_curves(rows: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """Draw a curve for every number in the rows: by job, then by group, otherwise in order of appearance.

    Args:
        rows: records as in ``metrics.jsonl``, with ``stage``, ``images`` and numbers; of two rows with the same stage
            and images the later one counts. Missing values are bridged, non-finite ones leave a gap; scalars without
            a finite value make no curve.
    """
    return compared_curves({"": rows})


def compared_curves(rows_by_run: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[Curve]:
    """Draw a curve for every number in the rows of any run, with a line for each run; see `training_curves`."""
    series: dict[str, dict[str, dict[str, dict[float, float]]]] = {}
    for run, rows in rows_by_run.items():
        for row in rows:
            of_stage = series.setdefault(row["stage"], {})
            for name, value in row.items():
                if name not in ("stage", "images") and isinstance(value, (int, float)):
                    of_stage.setdefault(name, {}).setdefault(run, {})[row["images"]] = value
    runs = [*rows_by_run]
    return [
        Curve(stage, _group(name), name, svg, _meaning(name))
        for stage, of_stage in series.items()
        for name in sorted(of_stage, key=lambda name: [*_GROUPS].index(_group(name)))
        if (svg := _draw(stage, name, of_stage[name], runs)) is not None
    ]


def legend(runs: Sequence[str]) -> Markup:
    """Names of runs with samples of their lines, as HTML."""
    entries = Markup()
    for index, run in enumerate(runs):
        color, dashes = _look(index)
        line = f'<line x1="1" x2="33" y1="6" y2="6" stroke="{color}" stroke-width="2.5" stroke-dasharray="{dashes}"/>'
        sample = f'<svg viewBox="0 0 34 12" width="34" height="12" aria-hidden="true">{line}</svg>'
        entries += Markup(f"<li>{sample} {{}}</li>").format(run)
    return Markup('<ul class="legend">{}</ul>').format(entries)


def latent_map_png(latent_map: LatentMap) -> bytes:
    """Draw a map of the latent space as a PNG, each point in the color of its density, the densest brightest."""
    figure = Figure(figsize=(_MAP_INCHES, _MAP_INCHES), dpi=_MAP_DPI, layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    axes.set_axis_off()
    order = np.argsort(latent_map.densities)  # the densest on top
    x, y = latent_map.points[order].T
    axes.scatter(x, y, _MAP_AREA / len(order), latent_map.densities[order], cmap=_MAP_COLORS, linewidths=0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return buffer.getvalue()


def smooth(values: np.ndarray) -> np.ndarray:
    """Average in a Gaussian window, without lag; NaN stays and adds nothing to its neighbors."""
    position = np.arange(len(values))
    window = np.exp(-0.5 * ((position - position[:, None]) / max(1.0, _SMOOTHING * len(values))) ** 2)
    known = np.isfinite(values)
    smoothed = window @ np.where(known, values, 0.0) / np.maximum(window @ known, np.finfo(float).tiny)
    return np.where(known, smoothed, np.nan)


def _group(name: str) -> str:
    return next(group for group, pattern in _GROUPS.items() if re.match(pattern, name))


def _meaning(name: str) -> str:
    meaning = metric_info(name).meaning
    return "" if meaning == name else meaning


def _look(index: int) -> tuple[str, str]:
    """Color and dashes (as SVG writes them) of the line of a run; both change, for those who see no colors."""
    return _COLORS[index % len(_COLORS)], _DASHES[index % len(_DASHES)]


class _Line(NamedTuple):
    """The points of one run."""

    run: str
    place: int
    """Among all runs."""
    images: np.ndarray
    values: np.ndarray

    @staticmethod
    def of(run: str, place: int, points: Mapping[float, float]) -> "_Line":
        images = np.array(sorted(points), dtype=float)
        values = np.array([points[position] for position in images], dtype=float)
        values[~np.isfinite(values)] = np.nan
        return _Line(run, place, _binned(images), _binned(values))

    @property
    def finite(self) -> np.ndarray:
        """Its values that are numbers."""
        return self.values[np.isfinite(self.values)]

    def words(self) -> str:
        """From where to where it goes."""
        return f"{self.run} from {self.finite[0]:.4g} to {self.finite[-1]:.4g}".strip()


def _draw(stage: str, name: str, points: Mapping[str, Mapping[float, float]], runs: Sequence[str]) -> Markup | None:
    lines = [_Line.of(run, runs.index(run), of_run) for run, of_run in points.items()]
    lines = [line for line in lines if len(line.finite)]
    if not lines:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4, 1.9), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            _plot(axes, line, alone=len(runs) == 1)
        _decorate(axes)
        finite = np.concatenate([line.finite for line in lines])
        _scale(axes, finite.min(), finite.max())
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    seen = max(line.images[-1] for line in lines)
    text = f"{name} of {stage} over {seen:,.0f} images: {'; '.join(line.words() for line in lines)}"
    return _inline(buffer.getvalue(), text)


def _plot(axes: Axes, line: _Line, alone: bool) -> None:
    """Draw a line smoothed; where it is alone, also as it is."""
    color, dashes = _look(line.place)
    style: Any = (0, tuple(map(float, dashes.split()))) if dashes else "-"
    if alone:
        axes.plot(line.images, line.values, color=color, alpha=0.35, linewidth=0.8)
    marker = "." if len(line.values) < 3 else None
    axes.plot(line.images, smooth(line.values), color=color, linewidth=1.6, linestyle=style, marker=marker)


def _decorate(axes: Axes) -> None:
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


def _inline(document: str, text: str) -> Markup:
    """The bare element of an SVG file: named for readers that cannot see it, its text in the color of the page."""
    element = document[document.index("<svg") :].replace(_TEXT, "currentColor")
    return Markup(element.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(text), 1))
