"""The session of a training under Ray Train."""

import time
from collections.abc import Mapping

import ray.train

from ray_jobs.runtime.progress_actor import ProgressActor
from ray_jobs.runtime.prometheus import Exporter
from vavae.progress import Progress
from vavae.runs.events import Event
from vavae.runs.jobs import Job

_NOTICE_SECONDS = 5.0


class RaySession:
    """A `Session` that reports to the driver's progress actor, to Ray Train, and to Prometheus.

    Args:
        run: name of the run.
        job: the training.
        progress: the driver's actor.
        owner: the driver, in words.
    """

    def __init__(self, run: str, job: Job, progress: ProgressActor, owner: str) -> None:
        self._progress, self._owner = progress, owner
        rank = ray.train.get_context().get_world_rank()
        self._first = rank == 0
        self._asked_at, self._preempted_nodes = time.monotonic(), set[str]()
        self._exporter = Exporter(run, job, str(rank))
        if self._first:
            starts = progress.count_start()
            self._exporter.show({"restarts": starts - 1, "saved_timestamp_seconds": time.time()})
            if starts > 1:
                self.event(Event("restart", job, details={"starts": starts}))

    @property
    def owner(self) -> str:
        """See `Session.owner`."""
        return self._owner

    def progress(self, progress: Progress) -> None:
        """See `Session.progress`."""
        self._progress.report(progress)

    def checkpoint(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """See `Session.checkpoint`. Our own commit record says what a checkpoint is, so Ray gets the metrics alone."""
        ray.train.report({"images_seen": images_seen, **metrics})
        if self._first:
            self._exporter.show({"saved_timestamp_seconds": time.time()})

    def row(self, row: Mapping[str, float]) -> None:
        """See `Session.row`."""
        self._exporter.show(row)

    def event(self, event: Event) -> None:
        """See `Session.event`."""
        self._progress.record(event)

    def stop_requested(self) -> bool:
        """See `Session.stop_requested`."""
        self._exporter.refresh()  # here, for every rank asks at every step
        return self._first and self._progress.stop_requested()

    def save_check_due(self) -> bool:
        """See `Session.save_check_due`."""
        if not self._first or time.monotonic() - self._asked_at < _NOTICE_SECONDS:
            return False
        self._asked_at = time.monotonic()
        return True

    def must_save(self) -> bool:
        """See `Session.must_save`: true once for every node of which Ray knows that it will be preempted."""
        notice = ray.train.get_preemption_info()
        new = set() if notice is None else {*notice.preempted_node_ids} - self._preempted_nodes
        self._preempted_nodes |= new
        return bool(new)
