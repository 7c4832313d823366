"""The workshop of a sweep: does each job once for all trials that ask for it.

It lies outside the trials, which take next to nothing: Ray would place the workers of a job within that.
"""

import io
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import ray

from ray_jobs.runtime.progress_actor import on_this_node
from ray_jobs.runtime.progress_monitor import told
from vavae.runs.config import RunConfig
from vavae.runs.events import EventLog
from vavae.runs.run import Job, Run
from vavae.sweep.sharing import SHARED_JOBS, Sharing
from vavae.sweep.trial import Task

Works = Mapping[Task, Callable[[Run], None]]
"""What does each task in a run."""

_SHOWN_SECONDS = 30.0


class _WorkshopActor:
    """Hands out the results of jobs, which are begun when they are first asked for, and hears how far they are."""

    def __init__(self, sharing: Sharing, works: Works) -> None:
        self._sharing, self._works = sharing, works
        self._begun: dict[str, Any] = {}
        self._heard: dict[tuple[str, Task], str] = {}

    def order(self, config: RunConfig, task: Task) -> list[Any]:
        """A reference, in a list that keeps it one, to the end of a job: one that goes on, or a new attempt."""
        run = _place(self._sharing, config, task)
        key = f"{task} {run.storage.url()} {config.train_lightningdit.images}"
        begun = self._begun.get(key)
        if begun is None or ray.wait([begun], timeout=0)[0]:
            workshop = Workshop(ray.get_runtime_context().current_actor, self._sharing)
            self._begun[key] = _do.remote(workshop, self._works[task], config, task)
        return [self._begun[key]]

    def hear(self, run: str, task: Task, line: str | None) -> None:
        """What a task in a run says of itself; None once it has ended."""
        if line is None:
            self._heard.pop((run, task), None)
        else:
            self._heard[run, task] = line

    def heard(self) -> list[str]:
        """What each task that goes on said last, behind the name of its run."""
        return [f"{run}  {line}" for (run, _), line in self._heard.items()]


class Workshop:
    """A handle to the workshop, for trials and jobs.

    Args:
        actor: the workshop itself.
        sharing: where what is shared lies.
    """

    def __init__(self, actor: Any, sharing: Sharing) -> None:
        self._actor, self.sharing = actor, sharing

    @staticmethod
    def open(sharing: Sharing, works: Works) -> "Workshop":
        """A new workshop; it lasts as long as a handle to it."""
        return Workshop(on_this_node(_WorkshopActor, max_restarts=-1).remote(sharing, works), sharing)

    def order(self, config: RunConfig, task: Task) -> Run:
        """Wait until a job is done and return the run that has what it makes; its errors are raised here."""
        run, job = _place(self.sharing, config, task), _shared(task)
        if job is None or run.artifact(job) is None:
            ray.get(ray.get(self._actor.order.remote(config, task))[0])
        return run

    @contextmanager
    def listening(self, run: str, task: Task) -> Iterator[None]:
        """Until the block ends, what this process prints is what a task says of itself."""
        try:
            with redirect_stdout(_Speech(lambda line: self._actor.hear.remote(run, task, line))):
                yield
        finally:
            self._actor.hear.remote(run, task, None)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Print again and again how far all tasks are, until the block ends."""
        ended = threading.Event()

        def show() -> None:
            while not ended.wait(_SHOWN_SECONDS):
                with suppress(ray.exceptions.RayActorError):  # a workshop that was lost comes back
                    for line in ray.get(self._actor.heard.remote()):
                        print(line, flush=True)

        shower = threading.Thread(target=show, daemon=True)
        shower.start()
        try:
            yield
        finally:
            ended.set()
            shower.join()


class _Speech(io.TextIOBase):
    """A file that gives away every line that is written into it."""

    def __init__(self, say: Callable[[str], Any]) -> None:
        self._say, self._rest = say, ""

    def write(self, text: str) -> int:
        """See `io.TextIOBase`."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(str.strip, lines):
            self._say(line)
        return len(text)


def _shared(task: Task) -> Job | None:
    """The job that a task is, if trials share what it makes."""
    return next((job for job in SHARED_JOBS if job == task), None)


def _place(sharing: Sharing, config: RunConfig, task: Task) -> Run:
    """The run in which a task is done."""
    job = _shared(task)
    return Run(config) if job is None else sharing.run(config, job)


@ray.remote(num_cpus=0, max_retries=0)
def _do(workshop: Workshop, work: Callable[[Run], None], config: RunConfig, task: Task) -> None:
    """Do one task, in a process of its own that takes no resources: the job's workers do."""
    job, run = _shared(task), Run(config)
    with workshop.listening(config.name, task):
        if job is not None:
            workshop.sharing.make(config, job, _noted(job, work), workshop.order)
        elif task == "measure_tokenizer":
            work(run)
        elif not run.plan(task).done:
            _noted(task, work)(run)


def _noted(job: Job, work: Callable[[Run], None]) -> Callable[[Run], None]:
    """A job that writes down in the folder of its run how it begins and ends."""

    def do(run: Run) -> None:
        with told(EventLog(run.storage), job):
            work(run)

    return do
