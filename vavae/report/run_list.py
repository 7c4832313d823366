"""The runs of a folder in a table: what each is, how far it is, and its figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vavae.errors import UserError
from vavae.evaluation.metric import Metric, read_metrics
from vavae.report.run_facts import run_byline, run_summary
from vavae.report.run_status import run_status
from vavae.runs.files import CONFIG, REPORT
from vavae.runs.run import Run
from vavae.storage.storage import Storage


@dataclass(frozen=True)
class ListedRun:
    """A run of a list."""

    name: str
    models: str
    """Its data and models; empty where it can't be read."""
    state: str
    """`done`, the job that is next, or why it can't be read."""
    worked: str
    """When it was last at work, by which code, and in what time."""
    metrics: dict[str, Metric]
    """Its figures, by name."""
    report: str | None
    """Address of its report on this machine; None where there is none."""


def runs_in(folder: Storage) -> list[str]:
    """Names of the runs that lie directly in a folder, sorted; none where the folder is a run itself."""
    if folder.is_file(CONFIG):
        return []
    return [name for name in folder.list() if folder.is_file(f"{name}/{CONFIG}")]


def list_runs(folder: Storage, overrides: Sequence[str] = ()) -> list[ListedRun]:
    """Read the runs that lie directly in a folder.

    Args:
        folder: folder of runs.
        overrides: `key.path=value`, laid over the configuration of each.
    """
    return [_listed(folder.child(name), name, overrides) for name in runs_in(folder)]


def _listed(storage: Storage, name: str, overrides: Sequence[str]) -> ListedRun:
    report, metrics = None, dict[str, Metric]()
    try:
        if storage.is_local and storage.is_file(REPORT):
            report = Path(storage.url(REPORT)).absolute().as_uri()
        metrics = {metric.name: metric for metric in read_metrics(storage)}
        run = Run.at(storage.url(), overrides).snapshot()
        to_do = (job for job in run_status(run, run.plans(sources=False)) if not job.plan.done)
        state = next((job.next_words for job in to_do), "done")
        return ListedRun(name, run_summary(run.config), state, run_byline(storage), metrics, report)
    except UserError as error:
        return ListedRun(name, "", str(error), "", metrics, report)
    except Exception as error:  # noqa: BLE001 - whatever is damaged in one does not hide the others
        return ListedRun(
            name, "", f"can't be read: {' '.join(f'{type(error).__name__}: {error}'.split())}", "", metrics, report
        )
