"""The driver's side of progress: what workers report is shown, exported as metrics, and written down as events."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

from ray_jobs.runtime.progress_actor import ProgressActor, ProgressUpdate
from ray_jobs.runtime.prometheus import Exporter
from vavae.errors import UserError
from vavae.progress import Progress, Rate, display
from vavae.runs.events import Event, EventLog
from vavae.runs.jobs import Job
from vavae.runs.run import Run

_POLL_SECONDS = 1.5

Show = Callable[[Progress | str], None]
"""Takes each moment of a job: its progress, or a word where there is none."""

_receiver: ContextVar[Show | None] = ContextVar("receiver", default=None)


@contextmanager
def redirect_progress(receive: Show) -> Iterator[None]:
    """Give the progress of the jobs in the block to a function, in place of the terminal."""
    token = _receiver.set(receive)
    try:
        yield
    finally:
        _receiver.reset(token)


@contextmanager
def monitor_progress(run: Run, job: Job, actor: ProgressActor, images: int | None = None) -> Iterator[None]:
    """Show the progress of a job until the block ends, export it as Ray metrics, and write its events down.

    Args:
        run: the run of the job.
        job: the job.
        actor: the one that the workers report to.
        images: total of pooled tasks, which only report how far they advance.
    """
    ended, receiver = threading.Event(), _receiver.get()
    exporter, events = Exporter(run.config.name, job, "driver"), EventLog(run.storage)
    with display(job) if receiver is None else nullcontext(receiver) as show:
        monitor = ProgressMonitor(job, actor, images, show, exporter, events)
        thread = threading.Thread(target=monitor.poll_until, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class ProgressMonitor:
    """Polls a progress actor, and passes on what it finds.

    Args:
        job: the job.
        actor: the actor to poll.
        images: total of pooled tasks.
        show: takes each moment of the job.
        exporter: of the job's metrics.
        events: of the run.
    """

    def __init__(
        self, job: Job, actor: ProgressActor, images: int | None, show: Show, exporter: Exporter, events: EventLog
    ) -> None:
        self._job, self._actor, self._images = job, actor, images
        self._show, self._exporter, self._events = show, exporter, events
        self._rate = Rate()

    def poll_until(self, ended: threading.Event) -> None:
        """Poll until the job has ended, and once more for its last events."""
        self._exporter.show({"stage_running": 1, "images": 0})
        while not ended.wait(_POLL_SECONDS):
            self._show(self._moment(self._poll()))
        self._poll()
        self._exporter.show({"stage_running": 0})

    def _poll(self) -> ProgressUpdate:
        self._exporter.refresh()
        update = self._actor.read()
        self._events.add(*update.events)
        return update

    def _moment(self, update: ProgressUpdate) -> Progress | str:
        """The progress of the job, exported where it counts its images; a word while it starts."""
        progress = update.progress
        if progress is None and update.advanced:
            progress = Progress(self._job, update.advanced, self._images, rate=self._rate.update(update.advanced))
        if progress is None:
            return "starting"
        if not progress.doing:
            self._exporter.show({"images": progress.done})
            if progress.total is not None:
                self._exporter.show({"images_planned": progress.total})
        return progress


@contextmanager
def log_job_events(events: EventLog, job: Job) -> Iterator[None]:
    """Write down how the job of the block begins and ends."""
    start = time.monotonic()
    events.add(Event("stage_begun", job))
    try:
        yield
    except KeyboardInterrupt:
        events.add(Event("stop", job))
        raise
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".partition("\n")[0]
        events.add(Event("failed", job, details={"error": text}))
        raise
    events.add(Event("stage_done", job, details={"seconds": round(time.monotonic() - start, 3)}))
