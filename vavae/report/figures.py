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
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from vavae.metrics.latent_space import LatentMap
from vavae.report.chart import Axis, Line, line_chart, look
from vavae.training.logging.metric_names import metric_info

_POINTS = 200
"""More points than this are averaged in bins: a long run must not make a large page."""
_SMOOTHING = 0.015
"""Deviation of the Gaussian window of the bold line, as a share of the points."""
_DECADES_FOR_LOG = 2
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
        color, dashes = look(index)
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

    def drawn(self, alone: bool) -> Line:
        """The line, smoothed; where it is alone, also as it is."""
        color, dashes = look(self.place)
        smoothed, raw = smooth(self.values).tolist(), self.values.tolist()
        return Line(self.run, self.images.tolist(), smoothed, color, dashes, raw, shows_raw=alone)

    def words(self) -> str:
        """From where to where it goes."""
        return f"{self.run} from {self.finite[0]:.4g} to {self.finite[-1]:.4g}".strip()


def _draw(stage: str, name: str, points: Mapping[str, Mapping[float, float]], runs: Sequence[str]) -> Markup | None:
    lines = [_Line.of(run, runs.index(run), of_run) for run, of_run in points.items()]
    lines = [line for line in lines if len(line.finite)]
    if not lines:
        return None
    finite = np.concatenate([line.finite for line in lines])
    log = bool(finite.min() > 0 and np.log10(finite.max() / finite.min()) > _DECADES_FOR_LOG)
    x, y = Axis.of([place for line in lines for place in line.images], margin=0), Axis.of(finite, log)
    seen = max(line.images[-1] for line in lines)
    text = f"{name} of {stage} over {seen:,.0f} images: {'; '.join(line.words() for line in lines)}"
    return line_chart([line.drawn(alone=len(runs) == 1) for line in lines], text, x, y)


def _binned(values: np.ndarray) -> np.ndarray:
    """At most ``_POINTS`` means of consecutive values; one that is missing makes its mean missing."""
    size = -(-len(values) // _POINTS)
    return np.array([values[start : start + size].mean() for start in range(0, len(values), size)])
