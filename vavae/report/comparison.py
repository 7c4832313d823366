"""Runs side by side: figures, what their configurations differ in, pictures, and curves in one frame."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from vavae.config import differences
from vavae.evaluation.metric import Metric
from vavae.report.figures import Curve, legend
from vavae.report.html import Report, headlines, page, protocols
from vavae.runs.config import RunConfig

_ABSENT = "-"

Value = TypeVar("Value")


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
    """Content of a comparison.

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
    of_results, others = (
        {
            each.key: dict(zip(reports, each.values, strict=True))
            for each in comparison.differences
            if each.identity is one
        }
        for one in (True, False)
    )
    metrics = _by_name({run: {metric.name: metric for metric in of.metrics} for run, of in reports.items()})
    first = headlines(metrics)
    return page(
        "report/comparison.html",
        title=" · ".join(reports),
        summary=f"{len(reports)} runs side by side",
        runs=[*reports],
        metrics=metrics,
        headlines={name: metrics[name] for name in first},
        others_measured={name: by_run for name, by_run in metrics.items() if name not in first},
        protocols=protocols(metric for by_run in metrics.values() for metric in _of_one_protocol(by_run.values())),
        best=_best,
        of_results=of_results,
        others=others,
        pictures_by_title=_by_name({run: {shown.title: shown for shown in of.pictures} for run, of in reports.items()}),
        legend=legend([*reports]),
        curves=comparison.curves,
        facts=_by_name({run: {"run": of.summary, "made": of.byline, **of.facts} for run, of in reports.items()}),
    )


def _by_name(by_run: Mapping[str, Mapping[str, Value]]) -> dict[str, dict[str, Value]]:
    """The values of each name, by the runs that have it."""
    names = dict.fromkeys(name for of_run in by_run.values() for name in of_run)
    return {name: {run: of_run[name] for run, of_run in by_run.items() if name in of_run} for name in names}


def _best(metrics: Collection[Metric]) -> float | None:
    """The best of the figures of several runs; None where they were not measured by one protocol."""
    if len(metrics) == 1 or not _of_one_protocol(metrics):
        return None
    return (max if next(iter(metrics)).better == "higher" else min)(metric.value for metric in metrics)


def _of_one_protocol(metrics: Collection[Metric]) -> Collection[Metric]:
    """The figures themselves; none where they were not measured by one protocol."""
    return metrics if len({metric.protocol for metric in metrics}) == 1 else ()
