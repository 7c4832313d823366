"""What the driver does while workers work: show how far they are, and write down what happens."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray_jobs.runtime.progress_actor import Board, News
from ray_jobs.runtime.prometheus import Exporter
from vavae.errors import UserError
from vavae.progress import Progress, Rate, clock, display
from vavae.runs.events import Event, EventLog
from vavae.runs.run import Job, Run

_MOMENT_SECONDS = 1.5


@contextmanager
def watched(run: Run, job: Job, board: Board, images: int | None = None) -> Iterator[None]:
    """Show a stage until the block ends: on the terminal, among Ray's metrics, and as events in the run's folder.

    Args:
        run: what it belongs to.
        job: the stage.
        board: where the workers post.
        images: for pooled tasks that `advance`: how many there are.
    """
    ended = threading.Event()
    watch = Watch(job, board, images, Exporter(run.config.name, job, "driver"), EventLog(run.storage))
    watcher = threading.Thread(target=watch.until, args=(ended,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


class Watch:
    """Looks at a board every moment.

    Args:
        stage: name of the job.
        board: to look at.
        images: how many there are, for pooled tasks.
        exporter: of the stage.
        events: where events go.
    """

    def __init__(self, stage: Job, board: Board, images: int | None, exporter: Exporter, events: EventLog) -> None:
        self._stage, self._board, self._images, self._exporter, self._events = stage, board, images, exporter, events
        self._start, self._rate = time.monotonic(), Rate()
        self._last: Progress | None = None

    def until(self, ended: threading.Event) -> None:
        """Watch until the stage has ended."""
        self._exporter.show({"stage_running": 1, "images": 0})
        with display(self._stage) as show:
            while not ended.wait(_MOMENT_SECONDS):
                show(self._moment(self._look()))
        self._look()
        self._exporter.show({"stage_running": 0})

    def _look(self) -> News:
        self._exporter.refresh()
        news = self._board.read()
        self._events.add(*news.events)
        return news

    def _moment(self, news: News) -> Progress | str:
        """How far the stage is; a word where that says too little."""
        progress = news.progress
        if news.advanced:
            progress = Progress(self._stage, news.advanced, self._images, rate=self._rate.update(news.advanced))
        before, self._last = self._last, progress
        elapsed = clock(time.monotonic() - self._start)
        if progress is None:
            return f"starting  {elapsed}"
        self._exporter.show({"images": progress.done})
        if progress.total is not None:
            self._exporter.show({"images_planned": progress.total})
        if before is not None and before.done == progress.done == progress.total:
            return f"finishing  {elapsed}"
        return progress


@contextmanager
def told(events: EventLog, job: Job) -> Iterator[None]:
    """Write down how a stage begins and ends."""
    start = time.monotonic()
    events.add(Event("stage_begun", job))
    try:
        yield
    except KeyboardInterrupt:
        events.add(Event("stop", job))
        raise
    except Exception as error:
        events.add(Event("failed", job, details={"error": _line(error)}))
        raise
    events.add(Event("stage_done", job, details={"seconds": round(time.monotonic() - start, 3)}))


def _line(error: Exception) -> str:
    """The first line of an error; all of it where that is ours."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".partition("\n")[0]
