"""The training loop's session under Ray Train."""

import time
from collections.abc import Mapping

import ray.train

from ray_jobs.runtime.progress_actor import Board
from ray_jobs.runtime.prometheus import Exporter
from vavae.progress import Progress
from vavae.runs.events import Event
from vavae.runs.run import Job, Run

_NOTICE_SECONDS = 5.0


class RaySession:
    """Speaks to the driver through the board, to Ray Train through its reports, and to Prometheus through metrics.

    Args:
        run: what is trained.
        job: of it.
        board: the driver's.
        owner: the driver, in words.
    """

    def __init__(self, run: Run, job: Job, board: Board, owner: str) -> None:
        self._board, self._owner = board, owner
        rank = ray.train.get_context().get_world_rank()
        self._first = rank == 0
        self._asked_at, self._going = time.monotonic(), set[str]()
        self._exporter = Exporter(run.config.name, job, str(rank))
        if self._first:
            starts = board.begin()
            self._exporter.show({"restarts": starts - 1, "saved_timestamp_seconds": time.time()})
            if starts > 1:
                self.event(Event("restart", job, details={"starts": starts}))

    @property
    def owner(self) -> str:
        """See `Session.owner`."""
        return self._owner

    def progress(self, progress: Progress) -> None:
        """See `Session.progress`."""
        self._board.post(progress)

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
        self._board.record(event)

    def stop_requested(self) -> bool:
        """See `Session.stop_requested`."""
        self._exporter.refresh()  # here, for every rank comes by at every step
        return self._first and self._board.stop_requested()

    def save_check_due(self) -> bool:
        """See `Session.save_check_due`."""
        if not self._first or time.monotonic() - self._asked_at < _NOTICE_SECONDS:
            return False
        self._asked_at = time.monotonic()
        return True

    def must_save(self) -> bool:
        """See `Session.must_save`: yes, once for every machine of which Ray knows that it will be taken away."""
        notice = ray.train.get_preemption_info()
        news = set() if notice is None else {*notice.preempted_node_ids} - self._going
        self._going |= news
        return bool(news)
