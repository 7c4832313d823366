"""The trackers of a job: whether they are installed, opening them, and the addresses of what they show."""

import importlib
import importlib.util
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

from PIL.Image import Image

from vavae.errors import UserError
from vavae.finite import finite_row
from vavae.storage.storage import Storage
from vavae.tracking.background_tracker import BackgroundTracker
from vavae.tracking.config import TrackerName
from vavae.tracking.tracker import TrackedJob, Tracker, TrackerRun

TRACKING = "tracking"
"""Folder of the records of trackers, in that of a training or of a run."""
_RUNS = {"wandb": "WandbRun", "mlflow": "MlflowRun", "trackio": "TrackioRun"}
"""Classes of the trackers that are packages of their own, which are imported where they are asked for."""


def check_trackers(names: Collection[str]) -> None:
    """Check that the packages of trackers are installed, without importing them.

    Raises:
        UserError: one is missing.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracking: {name} is not installed: pip install -e '.[{name}]'")


@contextmanager
def open_trackers(names: Collection[TrackerName], job: TrackedJob) -> Iterator[list[Tracker]]:
    """Open the trackers of a job for the block, which fails in them where it raises."""
    trackers = [_tracker(name, job) for name in names]
    failed = True
    try:
        yield trackers
        failed = False
    finally:
        for tracker in trackers:
            tracker.close(failed)


def track(
    names: Collection[TrackerName],
    job: TrackedJob,
    images_seen: int,
    metrics: Mapping[str, float],
    pictures: Mapping[str, Image] = MappingProxyType({}),
) -> None:
    """Show in trackers what a job has to say at once, as an evaluation has.

    Args:
        names: the trackers.
        job: the job.
        images_seen: images seen by the model that it is of.
        metrics: values by name.
        pictures: pictures by name.
    """
    with open_trackers(names, job) as trackers:
        for tracker in trackers:
            tracker.rewind(images_seen - 1)
            show_row([tracker], images_seen, metrics)
            for name, picture in pictures.items():
                tracker.picture(images_seen, name, picture)
            tracker.flush()()


def show_row(trackers: Sequence[Tracker], images_seen: int, row: Mapping[str, float]) -> None:
    """Show in trackers the metrics of a row that are finite."""
    finite = {name: value for name, value in finite_row(row).items() if value is not None}
    for tracker in trackers:
        tracker.metrics(images_seen, finite)


def links(records: Storage) -> dict[str, str]:
    """Addresses of a job in its trackers, by their names."""
    found = {path.removesuffix(".json"): records.read_json(path) for path in records.list() if path.endswith(".json")}
    return {name: record["link"] for name, record in found.items() if record["link"] is not None}


def _tracker(name: TrackerName, job: TrackedJob) -> Tracker:
    if name == "tensorboard":
        from vavae.tracking.tensorboard_tracker import TensorBoardTracker

        return TensorBoardTracker(job.tensorboard)
    return BackgroundTracker(name, lambda: _open_run(name, job))


def _open_run(name: str, job: TrackedJob) -> TrackerRun:
    """Open the job in a tracker under the identity that it has there; that is written down before, its link after."""
    file = f"{name}.json"
    known = job.records.read_json(file) if job.resumes and job.records.is_file(file) else None
    record = known or {"id": uuid.uuid4().hex, "link": None}
    job.records.write_json(file, record)
    run: TrackerRun = getattr(importlib.import_module(f"vavae.tracking.{name}_tracker"), _RUNS[name])(job, record["id"])
    job.records.write_json(file, {**record, "link": run.link})
    return run
