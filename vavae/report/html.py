"""The report of a run: one HTML file that holds everything it shows and asks no network for anything."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from itertools import groupby
from string import Template

from vavae.evaluation.metric import Metric
from vavae.report.curves import Curve


@dataclass(frozen=True)
class Picture:
    """A picture with its explanation; ``alt`` says in words what is to be seen, ``smooth`` that it is no pixels."""

    title: str
    caption: str
    png: bytes
    alt: str
    smooth: bool = False


@dataclass(frozen=True)
class Report:
    """What a report shows, in plain values; empty parts are left out.

    Args:
        title: name of the run.
        summary: what it is, in a line.
        facts: digests, images seen, time, hardware …
        metrics: the figures.
        pictures: image grids and plots.
        curves: see :func:`vavae.report.curves.training_curves`.
        config: the resolved configuration as YAML.
    """

    title: str
    summary: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[Metric] = ()
    pictures: Sequence[Picture] = ()
    curves: Sequence[Curve] = ()
    config: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page; one without content is left out."""

    heading: str
    content: str


ARROWS = {"higher": "↑", "lower": "↓"}
LEGEND = '<p class="note">↑ higher is better, ↓ lower is better; ± is the standard deviation over samplings.</p>'


def render(report: Report) -> str:
    """The report as the text of an HTML file."""
    return page(
        report.title,
        report.summary,
        [
            Section("Results", _metrics(report.metrics)),
            Section("Pictures", "".join(map(picture, report.pictures))),
            Section("Training", curve_panels(report.curves)),
            Section("Run", facts_table(report.facts)),
            Section("Configuration", yaml_text(report.config)),
        ],
    )


def page(title: str, summary: str, sections: Iterable[Section]) -> str:
    """A whole HTML file."""
    there = [section for section in sections if section.content]
    links = "".join(f'<a href="#{_anchor(section)}">{section.heading}</a>' for section in there)
    body = "".join(
        f'<section id="{_anchor(section)}"><h2>{section.heading}</h2>{section.content}</section>' for section in there
    )
    template = Template(files("vavae.report").joinpath("report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        summary=f'<p class="summary">{escape(summary)}</p>' if summary else "",
        links=f'<nav aria-label="Sections">{links}</nav>' if there else "",
        body=body,
    )


def _anchor(section: Section) -> str:
    return section.heading.lower().replace(" ", "-")


def figure_text(metric: Metric) -> str:
    """The figure with its spread and unit, as HTML."""
    spread = "" if metric.spread is None else f"\u202f±\u202f{metric.spread:.2g}"
    unit = f"\u202f{escape(metric.unit)}" if metric.unit else ""
    return f"{metric.value:.4g}{spread}{unit}"


def better_mark(metric: Metric) -> str:
    """Which way is better, as HTML."""
    return f'<span class="better" title="{metric.better} is better">{ARROWS[metric.better]}</span>'


def _metrics(metrics: Sequence[Metric]) -> str:
    if not metrics:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(metric.name)}</th>'
        f'<td class="figure">{figure_text(metric)} {better_mark(metric)}</td>'
        f'<td class="protocol">{escape(metric.protocol)}</td></tr>'
        for metric in metrics
    )
    head = '<tr><th scope="col">Measure</th><th scope="col">Value</th><th scope="col">Protocol</th></tr>'
    return f'<table class="metrics"><thead>{head}</thead><tbody>{rows}</tbody></table>{LEGEND}'


def picture(shown: Picture, heading: str | None = None) -> str:
    """A picture under its title, or another heading, as HTML."""
    data = base64.b64encode(shown.png).decode()
    return (
        f'<figure class="picture{" smooth" if shown.smooth else ""}"><h3>{escape(heading or shown.title)}</h3>'
        f'<img src="data:image/png;base64,{data}" alt="{escape(shown.alt)}">'
        f"<figcaption>{escape(shown.caption)}</figcaption></figure>"
    )


def curve_panels(curves: Iterable[Curve]) -> str:
    """Curves under the headings of their stages and groups, as HTML."""
    parts = []
    for (stage, group), members in groupby(curves, key=lambda curve: (curve.stage, curve.group)):
        panels = "".join(
            f'<figure class="curve"><figcaption><b>{escape(curve.name)}</b>{_meaning(curve)}</figcaption>'
            f"{curve.svg}</figure>"
            for curve in members
        )
        parts.append(f'<h3>{escape(stage)}: {escape(group)}</h3><div class="curves">{panels}</div>')
    if parts:
        parts.append('<p class="note">Over images seen; the bold line is smoothed.</p>')
    return "".join(parts)


def _meaning(curve: Curve) -> str:
    return f" {escape(curve.meaning)}" if curve.meaning else ""


def facts_table(facts: Mapping[str, str]) -> str:
    """Facts by their names, as HTML."""
    if not facts:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(fact)}</td></tr>' for name, fact in facts.items()
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def yaml_text(text: str) -> str:
    """A configuration that can be unfolded, as HTML."""
    return f"<details><summary>Resolved YAML</summary><pre>{escape(text)}</pre></details>" if text else ""
