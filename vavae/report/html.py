"""The report of a run: one HTML file that holds everything it shows and asks no network for anything.

Styles are `page.css`, behavior is `page.js`; every page has both within it, and shows all it holds without scripts.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import groupby
from operator import attrgetter
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from vavae.evaluation.metric import Metric
from vavae.report.figures import Curve, Picture


@dataclass(frozen=True)
class Report:
    """Content of a report in plain values; empty parts are left out.

    Args:
        title: name of the run.
        summary: what it is, in a line.
        byline: when it was made, by which code, and in what time.
        facts: digests, images seen, time, hardware …
        metrics: the figures.
        pictures: image grids and plots.
        curves: see :func:`vavae.report.figures.training_curves`.
        config: the resolved configuration as YAML.
    """

    title: str
    summary: str = ""
    byline: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[Metric] = ()
    pictures: Sequence[Picture] = ()
    curves: Sequence[Curve] = ()
    config: str = ""


_TEMPLATES = Environment(
    loader=PackageLoader("vavae", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def number(value: float) -> str:
    """A metric with four digits, or all of those before the point."""
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _groups(items: Iterable[Any], name: str) -> list[list[Any]]:
    """Consecutive items that have one value of an attribute.

    Unlike the filter of Jinja it does not sort them.
    """
    return [list(group) for _, group in groupby(items, attrgetter(name))]


def _breakable(name: str) -> Markup:
    """A name that may be broken between its words.

    On a phone it would else widen its column, or be cut between any two letters.
    """
    return Markup(re.sub(r"([_./=]|, ?)(?=\w)", r"\1<wbr>", str(escape(name))))


_TEMPLATES.filters |= {"number": number, "groups": _groups, "breakable": _breakable}

HEADLINES = {
    "generation_frechet_distance": "Fréchet distance of samples",
    "reconstruction_frechet_distance": "Fréchet distance of reconstructions",
    "psnr": "PSNR of reconstructions",
    "class_agreement": "samples that a classifier puts into their class",
    "alignment_cosine": "alignment, cosine of latents and teacher features",
}
"""Metrics that a page opens with, in words; where one is not there, the next of the others takes its place."""


def headlines(names: Iterable[str]) -> list[str]:
    """The metrics that a page opens with: as many of these names as `HEADLINES` has."""
    names = [*names]
    known = [name for name in HEADLINES if name in names]
    return [*known, *(name for name in names if name not in HEADLINES)][: len(HEADLINES)]


def protocols(metrics: Iterable[Metric]) -> dict[str, list[str]]:
    """Each protocol once, with the names of the metrics that were measured by it."""
    found: dict[str, list[str]] = {}
    for metric in metrics:
        if metric.protocol and metric.name not in found.setdefault(metric.protocol, []):
            found[metric.protocol].append(metric.name)
    return found


def render(report: Report) -> str:
    """The report as the text of an HTML file."""
    by_name = {metric.name: metric for metric in report.metrics}
    return page(
        "report/run.html",
        **vars(report),
        headlines={HEADLINES.get(name, name): by_name[name] for name in headlines(by_name)},
        protocols=protocols(report.metrics),
    )


def page(template: str, **shown: Any) -> str:
    """A whole HTML file from a template that extends ``report/page.html``, by its path in the package.

    Its policy lets a browser fetch nothing, and run no script but the page's own.
    """
    script = files("vavae.report").joinpath("page.js").read_text(encoding="utf-8")
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{own}'"
    return _TEMPLATES.get_template(template).render(
        {"byline": "", **shown}, script=Markup(script), policy=Markup(policy)
    )
