"""The tasks of a sweep: each is run once for all trials that request it, in processes outside of the trials.

A trial itself takes next to nothing: Ray would place the workers of a job within its resources.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import ray

from ray_jobs.runtime.command import JobFunction
from ray_jobs.runtime.progress_actor import on_this_node
from ray_jobs.runtime.progress_monitor import log_job_events, redirect_progress
from vavae.progress import NAME_WIDTH, Progress
from vavae.runs.config import RunConfig
from vavae.runs.events import EventLog
from vavae.runs.jobs import Job
from vavae.runs.run import Run
from vavae.sweep.sharing import Sharing
from vavae.sweep.trial import Task

TaskFunctions = Mapping[Task, JobFunction]
"""The function that runs each task in a run."""

_SHOW_SECONDS = 30.0


class TaskProgress(NamedTuple):
    """The latest progress of a running task."""

    run: str
    task: Task
    progress: Progress | str

    def line(self) -> str:
        """The line of the progress, behind the name of the run."""
        if isinstance(self.progress, Progress):
            return f"{self.run}  {self.progress.line()}"
        return f"{self.run}  {self.task:<{NAME_WIDTH}} {self.progress}"


class _SharedTasksActor:
    """Starts each task when it is first requested, and holds the progress of those that run."""

    def __init__(self, sharing: Sharing, functions: TaskFunctions) -> None:
        self._sharing, self._functions = sharing, functions
        self._started: dict[str, Any] = {}
        self._progress: dict[tuple[str, Task], TaskProgress] = {}

    def request(self, config: RunConfig, task: Task) -> list[Any]:
        """A reference to the end of a running task, or of a new attempt; the list keeps Ray from waiting for it."""
        key = _task_key(self._sharing, config, task)
        started = self._started.get(key)
        if started is None or ray.wait([started], timeout=0)[0]:
            shared_tasks = SharedTasks(ray.get_runtime_context().current_actor, self._sharing)
            self._started[key] = _run_task.remote(shared_tasks, self._functions[task], config, task)
        return [self._started[key]]

    def report(self, progress: TaskProgress) -> None:
        self._progress[progress.run, progress.task] = progress

    def end(self, run: str, task: Task) -> None:
        self._progress.pop((run, task), None)

    def progress(self) -> list[TaskProgress]:
        return list(self._progress.values())


class SharedTasks:
    """A handle to the actor of the tasks, for driver, trials and tasks.

    Args:
        actor: the actor.
        sharing: where shared artifacts lie.
    """

    def __init__(self, actor: Any, sharing: Sharing) -> None:
        self._actor, self.sharing = actor, sharing

    @staticmethod
    def start(sharing: Sharing, functions: TaskFunctions) -> "SharedTasks":
        """Start an actor, which lasts as long as a handle to it."""
        return SharedTasks(on_this_node(_SharedTasksActor, max_restarts=-1).remote(sharing, functions), sharing)

    def request(self, config: RunConfig, task: Task) -> Run:
        """Wait until a task is done, and return the run that holds what it makes; its errors are raised here."""
        run, job = _run_of(self.sharing, config, task), _shared_job(self.sharing, task)
        if job is None or run.artifact(job) is None:
            ray.get(ray.get(self._actor.request.remote(config, task))[0])
        return run

    @contextmanager
    def collect_progress(self, run: str, task: Task) -> Iterator[None]:
        """Report the progress of the jobs in the block as that of a task.

        Args:
            run: name of the run.
            task: the task.
        """
        try:
            with redirect_progress(lambda moment: self._actor.report.remote(TaskProgress(run, task, moment))):
                yield
        finally:
            self._actor.end.remote(run, task)

    @contextmanager
    def show_progress(self) -> Iterator[None]:
        """Print the progress of all running tasks at intervals until the block ends, where there is any."""
        ended = threading.Event()

        def show() -> None:
            printed: set[str] = set()
            while not ended.wait(_SHOW_SECONDS):
                with suppress(ray.exceptions.RayActorError):  # a lost actor is restarted
                    lines = [progress.line() for progress in ray.get(self._actor.progress.remote())]
                    for line in lines:
                        if line not in printed:
                            print(line, flush=True)
                    printed = {*lines}

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _shared_job(sharing: Sharing, task: Task) -> Job | None:
    """The job of a task whose artifact trials share; None for other tasks."""
    return next((job for job in sharing.jobs if job == task), None)


def _run_of(sharing: Sharing, config: RunConfig, task: Task) -> Run:
    """The run in which a task is run for a trial."""
    job = _shared_job(sharing, task)
    return Run(config) if job is None else sharing.run(config, job)


def _task_key(sharing: Sharing, config: RunConfig, task: Task) -> str:
    """A name of a task that those who request the same have in common."""
    key = f"{task} {_run_of(sharing, config, task).storage.url()}"
    # The folder of a shared artifact names its content; a trial's own tasks are done again at each rung.
    return key if _shared_job(sharing, task) is not None else f"{key} {config.train_lightningdit.images}"


@ray.remote(num_cpus=0, max_retries=0)
def _run_task(shared_tasks: SharedTasks, function: JobFunction, config: RunConfig, task: Task) -> None:
    """Run one task, in a process of its own that takes no resources: the workers of its job do."""
    job, run = _shared_job(shared_tasks.sharing, task), Run(config)
    with shared_tasks.collect_progress(config.name, task):
        if job is not None:
            shared_tasks.sharing.make(config, job, _with_events(job, function), shared_tasks.request)
        elif task == "evaluate_tokenizer":
            function(run)
        elif not run.plan(task).done:
            _with_events(task, function)(run)


def _with_events(job: Job, function: JobFunction) -> JobFunction:
    """Make a job write down in the folder of its run how it begins and ends."""

    def run_job(run: Run) -> None:
        with log_job_events(EventLog(run.storage), job):
            function(run)

    return run_job
