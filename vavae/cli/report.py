"""``vavae report``: the report of a run made again, or several runs side by side, in a page of this machine."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vavae.cli.arguments import add_hourly_price, open_run
from vavae.errors import UserError

if TYPE_CHECKING:
    from vavae.runs.run import Run

_LINK_SECONDS = 12 * 3600
"""Time for which a signed link opens the report in a store."""


def add_commands(commands: Any) -> None:
    """Add ``vavae report``; ``act`` of its arguments returns the exit status."""
    report = commands.add_parser("report", help="make the report of a run again, or put runs side by side")
    report.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder or URL of a run, or its YAML configuration; or one of runs",
    )
    report.add_argument("--out", metavar="FILE", help="default: one of the run's name in the temporary folder")
    add_hourly_price(report)
    report.set_defaults(act=_report)


def _report(arguments: argparse.Namespace) -> int:
    from vavae.report.run_list import list_runs, runs_in
    from vavae.report.run_list_page import render_runs
    from vavae.storage.storage import Storage

    folder = Storage(arguments.runs[0])
    if len(arguments.runs) == 1 and runs_in(folder):
        _write(render_runs(folder.url(), list_runs(folder)), arguments.out, "runs")
        return 0
    return _report_runs(arguments.runs, arguments.hourly_price, arguments.out)


def _report_runs(places: Sequence[str], hourly_price: float | None, out: str | None) -> int:
    """Write the report of a run, or of several side by side."""
    from vavae.report.comparison import Comparison, compare_configurations, render_comparison
    from vavae.report.figures import compared_curves
    from vavae.report.html import render
    from vavae.report.run_report import log_rows, run_report
    from vavae.runs.evaluation_inputs import ReportInputs
    from vavae.runs.files import REPORT

    runs = _open_runs(places, hourly_price)
    inputs = {name: ReportInputs.of(run) for name, run in runs.items()}
    if len(inputs) == 1:
        text = render(run_report(*inputs.values()))
    else:
        comparison = Comparison(
            reports={name: run_report(each) for name, each in inputs.items()},
            differences=compare_configurations([each.config for each in inputs.values()]),
            curves=compared_curves({name: log_rows(each) for name, each in inputs.items()}),
        )
        text = render_comparison(comparison)
    _write(text, out, "comparison" if len(runs) > 1 else next(iter(runs)))
    if len(runs) == 1:
        (run,) = runs.values()
        link = run.storage.signed_link(REPORT, "text/html", _LINK_SECONDS) if run.storage.is_file(REPORT) else None
        if link is not None:
            print(f"in the store, for whoever has this link within {_LINK_SECONDS // 3600} hours: {link}")
    return 0


def _write(text: str, out: str | None, name: str) -> None:
    """Write a page, into a file of the temporary folder unless another is named, and say where it is."""
    from vavae.storage.scratch import scratch_folder

    # Not the working folder: that is most often a checkout, whose files vavae submit uploads.
    path = Path(out or scratch_folder() / "reports" / f"{name}.html")
    try:
        if out is None:
            path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}; name another file") from error
    print(f"report: {path.absolute()}")


def _open_runs(places: Sequence[str], hourly_price: float | None) -> Mapping[str, "Run"]:
    """Open the runs at some places, by their names, or by their places where names are not enough.

    Args:
        places: folders of runs (paths or storage URLs), or configuration files.
        hourly_price: what a worker costs in an hour, in place of the configured price; None keeps that.

    Raises:
        UserError: there is no run at one of them.
    """
    prices = [] if hourly_price is None else [f"workers.hourly_price={hourly_price}"]
    runs = [open_run(place, prices) for place in places]
    names = [run.config.name for run in runs]
    labels = names if len({*names}) == len(names) else [run.storage.url() for run in runs]
    if len({*labels}) < len(labels):
        raise UserError(f"a run is named twice among {', '.join(places)}: name each once")
    return dict(zip(labels, runs, strict=True))
