"""The table of the runs of a folder as one HTML file."""

from collections.abc import Sequence
from typing import NamedTuple

from vavae.report.html import headlines, number, page
from vavae.report.run_list import ListedRun


class _Cell(NamedTuple):
    text: str
    value: float | str
    title: str


def render_runs(folder: str, runs: Sequence[ListedRun]) -> str:
    """The table as the text of an HTML file.

    Args:
        folder: path or URL of the folder.
        runs: of it.
    """
    measured = {name: metric for run in runs for name, metric in run.metrics.items()}
    columns = [measured[name] for name in headlines(measured)]
    cells = {
        run.name: [
            _Cell(number(found.value), found.value, found.protocol)
            if (found := run.metrics.get(column.name)) is not None
            else _Cell("-", "", "")
            for column in columns
        ]
        for run in runs
    }
    return page("report/runs.html", title=folder, summary=f"{len(runs)} runs", runs=runs, columns=columns, cells=cells)
