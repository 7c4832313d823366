"""The report of a run: one HTML file that holds everything it shows and asks no network for anything."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from itertools import groupby
from string import Template
from typing import Literal

from vavae.report.curves import Curve


@dataclass(frozen=True)
class Metric:
    """A figure and all that is needed to compare it with another.

    Args:
        name: what was measured.
        value: the figure.
        unit: such as "dB"; empty for plain numbers.
        protocol: extractor, number of images, guidance and the like.
        better: which way is better.
        spread: standard deviation of the figure, where it is a mean over several draws.
    """

    name: str
    value: float
    unit: str = ""
    protocol: str = ""
    better: Literal["higher", "lower"] = "lower"
    spread: float | None = None


@dataclass(frozen=True)
class Picture:
    """A picture with its explanation; ``alt`` says in words what is to be seen."""

    title: str
    caption: str
    png: bytes
    alt: str


@dataclass(frozen=True)
class Report:
    """What a report shows, in plain values; empty parts are left out.

    Args:
        title: name of the run.
        facts: name, digests, images seen, wall time, hardware, command …
        metrics: the figures.
        pictures: image grids and plots.
        curves: see :func:`vavae.report.curves.training_curves`.
        config: the resolved configuration as YAML.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[Metric] = ()
    pictures: Sequence[Picture] = ()
    curves: Sequence[Curve] = ()
    config: str = ""


def render(report: Report) -> str:
    """The report as the text of an HTML file."""
    sections = [
        ("Results", _metrics(report.metrics)),
        ("Pictures", "".join(map(_picture, report.pictures))),
        ("Training", _curves(report.curves)),
        ("Run", _facts(report.facts)),
        ("Configuration", _config(report.config)),
    ]
    body = "".join(f"<section><h2>{heading}</h2>{content}</section>" for heading, content in sections if content)
    template = Template(files("vavae.report").joinpath("report.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(report.title), body=body)


def _metrics(metrics: Sequence[Metric]) -> str:
    if not metrics:
        return ""
    arrows = {"higher": "↑", "lower": "↓"}
    rows = "".join(
        f'<tr><th scope="row">{escape(metric.name)}</th>'
        f'<td class="figure">{metric.value:.4g}{_unit(metric.unit)}'
        f' <span class="better" title="{metric.better} is better">{arrows[metric.better]}</span></td>'
        f"<td>{escape(metric.protocol)}</td></tr>"
        for metric in metrics
    )
    head = '<tr><th scope="col">Measure</th><th scope="col">Value</th><th scope="col">Protocol</th></tr>'
    legend = '<p class="note">↑ higher is better, ↓ lower is better.</p>'
    return f'<table class="metrics"><thead>{head}</thead><tbody>{rows}</tbody></table>{legend}'


def _unit(unit: str) -> str:
    return f"\u202f{escape(unit)}" if unit else ""


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure class="picture"><h3>{escape(picture.title)}</h3>'
        f'<img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _curves(curves: Iterable[Curve]) -> str:
    parts = []
    for (stage, group), members in groupby(curves, key=lambda curve: (curve.stage, curve.group)):
        panels = "".join(
            f'<figure class="curve"><figcaption>{escape(curve.name)}</figcaption>{curve.svg}</figure>'
            for curve in members
        )
        parts.append(f'<h3>{escape(stage)}: {escape(group)}</h3><div class="curves">{panels}</div>')
    if parts:
        parts.append('<p class="note">Over images seen; the bold line is smoothed.</p>')
    return "".join(parts)


def _facts(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(fact)}</td></tr>' for name, fact in facts.items()
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _config(text: str) -> str:
    return f"<details><summary>Resolved YAML</summary><pre>{escape(text)}</pre></details>" if text else ""
