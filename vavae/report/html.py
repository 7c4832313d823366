"""The report of a run: one HTML file that holds everything it shows and asks no network for anything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vavae.evaluation.metric import Metric
from vavae.report.figures import Curve, Picture


@dataclass(frozen=True)
class Report:
    """Content of a report in plain values; empty parts are left out.

    Args:
        title: name of the run.
        summary: what it is, in a line.
        facts: digests, images seen, time, hardware …
        metrics: the figures.
        pictures: image grids and plots.
        curves: see :func:`vavae.report.figures.training_curves`.
        config: the resolved configuration as YAML.
    """

    title: str
    summary: str = ""
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


_TEMPLATES.filters["number"] = number


def render(report: Report) -> str:
    """The report as the text of an HTML file."""
    return page("report/run.html", **vars(report))


def page(template: str, **shown: Any) -> str:
    """A whole HTML file from a template that extends ``report/page.html``, by its path in the package."""
    return _TEMPLATES.get_template(template).render(shown)
