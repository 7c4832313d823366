"""Runs side by side: figures, what their configurations differ in, pictures, and curves in one frame."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

from vavae.config import differences
from vavae.evaluation.metric import Metric
from vavae.report.curves import Curve, legend
from vavae.report.html import LEGEND, Report, Section, better_mark, curve_panels, figure_text, page, picture
from vavae.runs.config import RunConfig

_ABSENT = "-"


class Difference(NamedTuple):
    """A key of the configuration that is not the same in all runs."""

    key: str
    """Dotted path."""
    values: tuple[str, ...]
    """By run, as YAML would have it."""
    identity: bool
    """Whether it changes results; else it says how the run was carried out."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison shows.

    Args:
        reports: of the runs, by name.
        differences: of their configurations.
        curves: with a line for each run, in the order of the reports.
    """

    reports: Mapping[str, Report]
    differences: Sequence[Difference]
    curves: Sequence[Curve]


def compare_configurations(configs: Sequence[RunConfig]) -> list[Difference]:
    """All keys that differ between any two, but for the name; those that change results first."""
    found = {}
    dumps = [config.model_dump(mode="json") for config in configs]
    of_results = {path for other in configs[1:] for path, *_ in differences(configs[0], other)}
    for other in dumps[1:]:
        for path, *_ in differences(dumps[0], other):
            found[path] = Difference(path, tuple(_at(dump, path) for dump in dumps), path in of_results)
    return sorted((found[path] for path in found if path != "name"), key=lambda each: not each.identity)


def _at(document: Any, path: str) -> str:
    """The value at a dotted path, in words."""
    for part in path.split("."):
        if not isinstance(document, Mapping) or part not in document:
            return _ABSENT
        document = document[part]
    return "null" if document is None else str(document).lower() if isinstance(document, bool) else str(document)


def render_comparison(comparison: Comparison) -> str:
    """The comparison as the text of an HTML file."""
    reports = comparison.reports
    curves = curve_panels(comparison.curves)
    return page(
        " · ".join(reports),
        f"{len(reports)} runs side by side",
        [
            Section("Results", _results(reports)),
            Section("Differences of configuration", _differences(comparison.differences, [*reports])),
            Section("Pictures", _pictures(reports)),
            Section("Training", legend([*reports]) + curves if curves else ""),
            Section("Runs", _facts(reports)),
        ],
    )


def _table(kind: str, corner: str, runs: Sequence[str], rows: Iterable[str]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in [corner, *runs])
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _results(reports: Mapping[str, Report]) -> str:
    figures = {run: {metric.name: metric for metric in report.metrics} for run, report in reports.items()}
    names = [*dict.fromkeys(name for of_run in figures.values() for name in of_run)]
    if not names:
        return ""
    rows = [row for name in names for row in _measure(name, {run: of.get(name) for run, of in figures.items()})]
    note = '<p class="note">The best figure is marked where all were measured by one protocol, which stands below.</p>'
    return _table("compared", "Measure", [*reports], rows) + LEGEND + note


def _measure(name: str, by_run: Mapping[str, Metric | None]) -> tuple[str, str]:
    """Two rows: the figure of every run; and below, the protocol or, where they differ, all of them."""
    there = {run: metric for run, metric in by_run.items() if metric is not None}
    protocols = {metric.protocol for metric in there.values()}
    any_metric = next(iter(there.values()))
    best = None
    if len(protocols) == 1 and len(there) > 1:
        best = (max if any_metric.better == "higher" else min)(metric.value for metric in there.values())
    cells = "".join(_figure(run, metric, best) for run, metric in by_run.items())
    heading = f'<th scope="row">{escape(name)} {better_mark(any_metric)}</th>'
    protocol = escape(any_metric.protocol)
    if len(protocols) > 1:
        each = "".join(f"<br>{escape(run)}: {escape(metric.protocol)}" for run, metric in there.items())
        protocol = f"<strong>Measured differently, so not to be compared.</strong>{each}"
    return heading + cells, f'<td class="protocol" colspan="{len(by_run) + 1}">{protocol}</td>'


def _figure(run: str, metric: Metric | None, best: float | None) -> str:
    if metric is None:
        return f'<td class="figure" data-run="{escape(run)}">{_ABSENT}</td>'
    text = figure_text(metric)
    if metric.value == best:
        text = f'<strong class="best">{text}<span class="unseen"> (best)</span></strong>'
    return f'<td class="figure" data-run="{escape(run)}">{text}</td>'


def _differences(found: Sequence[Difference], runs: Sequence[str]) -> str:
    of_results = [each for each in found if each.identity]
    others = [each for each in found if not each.identity]
    parts = ["<p>All keys that change results are the same.</p>"]
    if of_results:
        parts = [_difference_table(of_results, runs)]
    if others:
        summary = f"In how the runs were carried out: {len(others)}"
        parts.append(f"<details><summary>{summary}</summary>{_difference_table(others, runs)}</details>")
    return "".join(parts)


def _difference_table(found: Sequence[Difference], runs: Sequence[str]) -> str:
    return _table("differences", "Key", runs, [_row(each.key, zip(runs, each.values, strict=True)) for each in found])


def _row(heading: str, values: Any) -> str:
    cells = "".join(f'<td data-run="{escape(run)}">{escape(value)}</td>' for run, value in values)
    return f'<th scope="row">{escape(heading)}</th>{cells}'


def _pictures(reports: Mapping[str, Report]) -> str:
    titles = dict.fromkeys(shown.title for report in reports.values() for shown in report.pictures)
    parts = []
    for title in titles:
        beside = "".join(
            picture(shown, heading=f"{shown.title}: {run}")
            for run, report in reports.items()
            for shown in report.pictures
            if shown.title == title
        )
        parts.append(f'<div class="beside">{beside}</div>')
    return "".join(parts)


def _facts(reports: Mapping[str, Report]) -> str:
    facts = {run: {"run": report.summary, **report.facts} for run, report in reports.items()}
    names = dict.fromkeys(name for of_run in facts.values() for name in of_run)
    rows = [_row(name, [(run, of_run.get(name, _ABSENT)) for run, of_run in facts.items()]) for name in names]
    return _table("differences", "Fact", [*reports], rows)
