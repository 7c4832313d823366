"""Charts as inline SVG: drawn here, in the colors of the page around them; ``page.js`` adds values, smoothing and zoom.

Without the script they are complete pictures. Text has one size in a narrow chart; that of a wide one grows on phones
(``page.css``), where the picture shrinks.
"""

import json
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from markupsafe import Markup

import vavae.matplotlib_compat  # noqa: F401  (before matplotlib)

# isort: split
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

COLORS = ("#3f87d9", "#d2691e", "#2f9e68", "#b95fb0")
"""Contrast of at least 3 to 1 with white and with a near-black page; distinguishable to the color-blind."""
_DASHES = ("", "6 2.5", "1.5 2", "7 2 1.5 2")
_TICKS = 5
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_ENGINEERING = EngFormatter(sep="")


def look(index: int) -> tuple[str, str]:
    """Color and dashes (as SVG writes them) of a line; both change, for those who see no colors."""
    return COLORS[index % len(COLORS)], _DASHES[(index + index // len(COLORS)) % len(_DASHES)]


class Axis(NamedTuple):
    """One axis of a chart."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    @staticmethod
    def of(values: Iterable[float], log: bool = False, margin: float = 0.05) -> "Axis":
        """Axis over finite values; a constant gets room around it, or rounding errors would fill the axis."""
        values = list(values)
        low, high = min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
        room = margin * (high - low)
        if high - low <= 1e-6 * abs(high):
            room = 0.5 * abs(high) or 0.5
        low, high = low - room, high + room
        if log:
            low, high = 10**low, 10**high
        locator: Any = LogLocator(subs=(1.0,) if high / low > 10 else (1.0, 2.0, 5.0)) if log else MaxNLocator(_TICKS)
        places = [float(place) for place in locator.tick_values(low, high) if low <= place <= high]
        places = places[:: -(-len(places) // (_TICKS + 2))] if places else []
        return Axis(low, high, log, tuple((place, _short(place)) for place in places))

    @staticmethod
    def at(values: Iterable[float]) -> "Axis":
        """Logarithmic axis with a tick at each of a few values."""
        values = sorted(set(values))
        return Axis.of(values, log=True)._replace(ticks=tuple((value, _short(value)) for value in values))

    @staticmethod
    def named(names: Sequence[str]) -> "Axis":
        """Axis with a place for each name, from 0 on."""
        return Axis(-0.5, len(names) - 0.5, False, tuple(enumerate(names)))

    def share(self, value: float) -> float:
        """Place of a value, 0 at the low end to 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


class Line(NamedTuple):
    """A line of a chart; NaN leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    dashes: str = ""
    raw: Sequence[float] = ()
    """The same values before they were smoothed; empty where they are not."""
    shows_raw: bool = False
    """True where the values before smoothing are drawn, too, faintly."""
    deviations: Sequence[float] = ()
    trial: int | None = None
    """Number of the trial that the line is of."""


class Dot(NamedTuple):
    """A point of a scatter plot."""

    trial: int
    x: float
    y: float
    title: str
    """All there is to say of it, in a line."""
    color: str = COLORS[0]
    hollow: bool = False
    deviation_x: float | None = None
    deviation_y: float | None = None
    words: str = ""
    """Written beside it, where there is room."""


class Frame(NamedTuple):
    """Size of a chart and the box between its axes, in units of its view box."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int

    def x(self, axis: Axis, value: float) -> float:
        """Horizontal position of a value."""
        return self.left + (self.width - self.left - self.right) * axis.share(value)

    def y(self, axis: Axis, value: float) -> float:
        """Vertical position of a value."""
        return self.top + (self.height - self.top - self.bottom) * (1 - axis.share(value))


NARROW = Frame(320, 170, 46, 8, 8, 22)
TALL = Frame(320, 184, 46, 8, 8, 36)
"""Narrow, with room for names in two rows."""
WIDE = Frame(640, 380, 80, 48, 16, 36)
_CHARACTER = 6.4
"""Width of a character of a narrow chart, about."""


def line_chart(lines: Sequence[Line], label: str, x: Axis, y: Axis, frame: Frame = NARROW) -> Markup:
    """Draw lines, each smoothed or with marks and deviations.

    Args:
        lines: at least one.
        label: the chart in words.
        x: horizontal axis.
        y: vertical axis.
        frame: size.
    """
    drawn = Markup()
    for number, line in enumerate(lines):
        style = Markup('fill="none" stroke="{}" data-line="{}"').format(line.color, number)
        parts = Markup()
        if line.shows_raw:
            parts += Markup('<path d="{}" {} class="faint"/>').format(_path(line.x, line.raw, x, y, frame), style)
        path = _path(line.x, line.y, x, y, frame)
        parts += Markup('<path d="{}" {} stroke-dasharray="{}" class="bold"/>').format(path, style, line.dashes)
        for place, value in enumerate(line.y if line.trial is not None or len(line.y) < 3 else ()):
            if math.isfinite(value):
                at, height = frame.x(x, line.x[place]), frame.y(y, value)
                if line.deviations:
                    low, high = (frame.y(y, value + sign * line.deviations[place]) for sign in (-1, 1))
                    parts += _bar((at, at), (low, high), line.color)
                parts += Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="{}" data-mark="{},{}"/>').format(
                    at, height, line.color, number, place
                )
        if line.trial is not None:
            parts = Markup('<g data-trial="{}"><title>{}</title>{}</g>').format(line.trial, line.name, parts)
        drawn += parts
    numbers = {
        "x": (x.low, x.high, x.log),
        "y": (y.low, y.high, y.log),
        "frame": frame,
        "smooth": any(line.raw for line in lines),
        "lines": [
            {"name": line.name, "x": [*map(_written, line.x)], "y": [*map(_written, line.raw or line.y)]}
            for line in lines
        ],
    }
    drawn_ends = _ends([line for line in lines if line.trial is not None], x, y, frame)
    box = (frame.left, frame.top - 5, frame.width - frame.left, frame.height - frame.top - frame.bottom + 10)
    inner = Markup('<svg class="inner" x="{0}" y="{1}" width="{2}" height="{3}" viewBox="{0} {1} {2} {3}">{4}</svg>')
    inner = inner.format(*box, drawn)
    data = Markup(' data-chart="{}"').format(json.dumps(numbers, separators=(",", ":")))
    return _svg(frame, "wide" if frame == WIDE else "narrow", label, _axes(x, y, frame) + inner + drawn_ends, data)


def scatter_chart(
    dots: Sequence[Dot],
    label: str,
    x: Axis,
    y: Axis,
    frame: Frame = NARROW,
    steps: Sequence[tuple[float, float]] = (),
    arrows: Sequence[tuple[Dot, Dot]] = (),
) -> Markup:
    """Draw points that lead to the details of their trials.

    Args:
        dots: the points.
        label: the chart in words.
        x: horizontal axis.
        y: vertical axis.
        frame: size.
        steps: corners of a dotted staircase.
        arrows: from one point to another.
    """
    drawn = Markup()
    corners = [corner for before, after in pairwise(steps) for corner in (before, (after[0], before[1]))]
    if len(steps) > 1:
        corners.append(steps[-1])
        path = _path([corner[0] for corner in corners], [corner[1] for corner in corners], x, y, frame)
        drawn += Markup('<path d="{}" class="front"/>').format(path)
    for tail, head in arrows:
        drawn += _arrow(*((frame.x(x, dot.x), frame.y(y, dot.y)) for dot in (tail, head)))
    for dot in dots:
        drawn += _dot(dot, x, y, frame)
    if frame == WIDE:
        drawn += _words(dots, x, y, frame)
    return _svg(frame, "wide" if frame == WIDE else "narrow", label, _axes(x, y, frame) + drawn)


class Coordinate(NamedTuple):
    """One of several parallel axes."""

    name: str
    axis: Axis


def parallel_chart(coordinates: Sequence[Coordinate], trials: Sequence[Line], label: str) -> Markup:
    """Draw a line for each trial across parallel axes.

    Args:
        coordinates: from left to right, at least two.
        trials: their lines; ``y`` has a value for each coordinate.
        label: the chart in words.
    """
    frame = Frame(max(640, 130 * len(coordinates)), 330, 20, 90, 56, 16)
    spacing = (frame.width - frame.left - frame.right) / (len(coordinates) - 1)
    drawn = Markup()
    for line in trials:
        points = " ".join(
            f"{frame.left + place * spacing:.1f},{frame.y(each.axis, value):.1f}"
            for place, (each, value) in enumerate(zip(coordinates, line.y, strict=True))
        )
        drawn += Markup(
            '<a href="#trial-{}" data-trial="{}" aria-label="{}"><title>{}</title>'
            '<polyline points="{}" fill="none" stroke="{}" class="bold"/></a>'
        ).format(line.trial, line.trial, line.name, line.name, points, line.color)
    for place, each in enumerate(coordinates):
        at = frame.left + place * spacing
        drawn += Markup('<line x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}" class="axis-line"/>').format(
            at, frame.top, frame.height - frame.bottom
        )
        height = 16 if place % 2 == 0 else 34
        name_at, anchor = at, "start" if place == 0 else "middle"
        if each is coordinates[-1]:
            name_at, anchor = frame.width, "end"
        drawn += Markup('<text x="{:.1f}" y="{}" class="name" text-anchor="{}">{}</text>').format(
            name_at, height, anchor, each.name
        )
        for value, text in each.axis.ticks:
            drawn += Markup('<text x="{:.1f}" y="{:.1f}" class="tick">{}</text>').format(
                at + 5, frame.y(each.axis, value) + 4, text
            )
    return _svg(frame, "parallel", label, drawn)


def _ends(lines: Sequence[Line], x: Axis, y: Axis, frame: Frame) -> Markup:
    """Numbers of trials at the ends of their lines, apart from each other."""
    lines = sorted(lines, key=lambda line: -line.y[-1])
    bottom = frame.height - frame.bottom
    spacing = min(21.0, bottom / max(1, len(lines)))
    heights: list[float] = []
    for line in lines:
        heights.append(max(frame.y(y, line.y[-1]), heights[-1] + spacing if heights else frame.top))
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], bottom if place == len(heights) - 1 else heights[place + 1] - spacing)
    drawn = Markup()
    for line, height in zip(lines, heights, strict=True):
        at = frame.x(x, line.x[-1]) + 11
        drawn += Markup(
            '<text x="{:.1f}" y="{:.1f}" dy=".35em" class="number" style="fill: {}" data-trial="{}">{}</text>'
        ).format(at, height, line.color, line.trial, line.trial)
    return drawn


def _words(dots: Sequence[Dot], x: Axis, y: Axis, frame: Frame) -> Markup:
    """Numbers and words beside the points, each where it covers the least of others and of points."""
    points = [(frame.x(x, dot.x), frame.y(y, dot.y)) for dot in dots]
    outside = _outside(frame)
    taken = [(across - 6, down - 6, across + 6, down + 6) for across, down in points]
    drawn = Markup()
    for dot, (across, down) in zip(dots, points, strict=True):
        width = 1.15 * _CHARACTER * (len(dot.words) + 3)
        anchors = {"start": across + 7, "end": across - 7 - width, "middle": across - width / 2}
        places = [
            (anchor, (left, top, left + width, top + 15))
            for top in (down - 20, down + 5)
            for anchor, left in anchors.items()
        ]
        anchor, box = min(places, key=lambda place: sum(_overlap(place[1], other) for other in taken + outside))
        taken.append(box)
        at = {"start": box[0], "end": box[2], "middle": (box[0] + box[2]) / 2}[anchor]
        drawn += Markup(
            '<text x="{:.1f}" y="{:.1f}" text-anchor="{}" data-trial="{}"><tspan class="number">{}</tspan>'
            '<tspan class="words"> {}</tspan></text>'
        ).format(at, box[1] + 12, anchor, dot.trial, dot.trial, dot.words)
    return drawn


_Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""


def _overlap(one: _Box, other: _Box) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return across * down if across > 0 and down > 0 else 0.0


def _outside(frame: Frame) -> list[_Box]:
    """The areas left and right of the box between the axes, where no label may lie."""
    far = 10 * frame.width
    return [(-far, -far, frame.left, far), (frame.width, -far, far, far)]


def _dot(dot: Dot, x: Axis, y: Axis, frame: Frame) -> Markup:
    across, down = frame.x(x, dot.x), frame.y(y, dot.y)
    drawn = Markup()
    if dot.deviation_x:
        low, high = (frame.x(x, dot.x + sign * dot.deviation_x) for sign in (-1, 1))
        drawn += _bar((low, high), (down, down), dot.color)
    if dot.deviation_y:
        low, high = (frame.y(y, dot.y + sign * dot.deviation_y) for sign in (-1, 1))
        drawn += _bar((across, across), (low, high), dot.color)
    drawn += Markup('<circle cx="{:.1f}" cy="{:.1f}" r="11" class="reach"/>').format(across, down)
    drawn += Markup('<circle cx="{:.1f}" cy="{:.1f}" r="5" stroke="{}" fill="{}"/>').format(
        across, down, dot.color, "var(--page)" if dot.hollow else dot.color
    )
    return Markup('<a href="#trial-{}" data-trial="{}" aria-label="{}"><title>{}</title>{}</a>').format(
        dot.trial, dot.trial, dot.title, dot.title, drawn
    )


def _bar(xs: tuple[float, float], ys: tuple[float, float], color: str) -> Markup:
    """A bar of a deviation, between two points."""
    return Markup('<line x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}" stroke="{}" class="bar"/>').format(
        *xs, *ys, color
    )


def _arrow(tail: tuple[float, float], head: tuple[float, float]) -> Markup:
    """An arrow that ends before the points that it joins."""
    across, down = head[0] - tail[0], head[1] - tail[1]
    length = math.hypot(across, down)
    if length < 24:
        return Markup()
    u, v = across / length, down / length
    x1, y1, x2, y2 = tail[0] + 8 * u, tail[1] + 8 * v, head[0] - 9 * u, head[1] - 9 * v
    wings = (f"{x2 - 7 * u - side * 4 * v:.1f} {y2 - 7 * v + side * 4 * u:.1f}" for side in (1, -1))
    point = "L".join((next(wings), f"{x2:.1f} {y2:.1f}", next(wings)))
    return Markup('<path d="M{:.1f} {:.1f}L{:.1f} {:.1f}M{}" class="arrow"/>').format(x1, y1, x2, y2, point)


def _axes(x: Axis, y: Axis, frame: Frame) -> Markup:
    """Grid and numbers of both axes, each in a group that the script draws again after zooming."""
    bottom, right = frame.height - frame.bottom, frame.width - frame.right
    ticks_x, ticks_y = Markup(), Markup()
    room = (right - frame.left) / max(1, len(x.ticks))
    crowded = any(len(text) * _CHARACTER > room for _, text in x.ticks)
    for place, (value, text) in enumerate(x.ticks):
        at = frame.x(x, value)
        row = "2.4em" if crowded and place % 2 else "1.1em"
        ticks_x += Markup('<line x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(at, frame.top, bottom)
        anchor = "middle"
        if at + len(text) * _CHARACTER / 2 > frame.width:
            at, anchor = frame.width, "end"
        ticks_x += Markup('<text x="{:.1f}" y="{}" dy="{}" text-anchor="{}">{}</text>').format(
            at, bottom + 4, row, anchor, text
        )
    for value, text in y.ticks:
        at = frame.y(y, value)
        ticks_y += Markup('<line x1="{1}" x2="{2}" y1="{0:.1f}" y2="{0:.1f}"/>').format(at, frame.left, right)
        ticks_y += Markup('<text x="{}" y="{:.1f}" dy=".35em" text-anchor="end">{}</text>').format(
            frame.left - 6, at, text
        )
    return Markup('<g class="ticks x">{}</g><g class="ticks y">{}</g>').format(ticks_x, ticks_y)


def _path(xs: Sequence[float], ys: Sequence[float], x: Axis, y: Axis, frame: Frame) -> str:
    """The outline of a line; values that are not finite interrupt it."""
    parts, before = [], False
    for across, value in zip(xs, ys, strict=True):
        if math.isfinite(value):
            parts.append(f"{'L' if before else 'M'}{frame.x(x, across):.1f} {frame.y(y, value):.1f}")
        before = math.isfinite(value)
    return "".join(parts)


def _svg(frame: Frame, kind: str, label: str, content: Markup, data: str = "") -> Markup:
    """The element: a picture with words for readers that can't see it, or a group of links."""
    role = "group" if "<a " in content else "img"
    return Markup('<svg viewBox="0 0 {} {}" class="chart {}" role="{}" aria-label="{}"{}>{}</svg>').format(
        frame.width, frame.height, kind, role, label, data, content
    )


def _written(value: float) -> float | None:
    """A number with five digits for the script; none where it is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _short(value: float) -> str:
    """A tick in few characters."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:,.6g}"
    if abs(value) >= 1e4:
        return str(_ENGINEERING(value))
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    mantissa = f"{value / 10**exponent:.3g}"
    power = f"10{str(exponent).translate(_SUPERSCRIPTS)}"
    return power if mantissa == "1" else f"{mantissa}·{power}"
