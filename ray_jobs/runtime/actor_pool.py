"""A pool of actors that each load their models once and then process one item after another."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, TypeVar

import ray

from ray_jobs.runtime.progress_actor import ProgressActor
from ray_jobs.runtime.progress_monitor import monitor_progress
from ray_jobs.runtime.resources import Resources
from vavae.distributed.config import WorkersConfig
from vavae.distributed.torch_settings import configure_torch
from vavae.errors import UserError
from vavae.runs.jobs import Job
from vavae.runs.run import Run

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
Work = Callable[[ItemT, ProgressActor], ResultT]
"""Processes one item, and tells the actor how far it is; what it returns is small, for all results are kept."""


class Worker:
    """One actor of a pool.

    Args:
        make_work: loads models and opens storage.
        workers: settings of torch.
        progress: takes what is done.
    """

    def __init__(
        self, make_work: Callable[[], Work[Any, Any]], workers: WorkersConfig, progress: ProgressActor
    ) -> None:
        configure_torch(workers)
        self._work, self._progress = make_work(), progress

    def do(self, item: Any) -> Any:
        """Process one item; returns its result."""
        try:
            return self._work(item, self._progress)
        finally:
            self._progress.advances.flush()


def work_through(
    run: Run,
    job: Job,
    make_work: Callable[[], Work[ItemT, ResultT]],
    items: Sequence[ItemT],
    images: int,
    actors: int,
    resources: Resources | None = None,
    items_of_an_actor: int = 1,
) -> list[ResultT]:
    """Process all items with at most `actors` at a time, showing progress in images.

    Args:
        run: shown and recorded as that of the job.
        job: name of the job in its progress.
        make_work: called once in every actor, to load models and open storage.
        items: independent of each other; processing one that is done already must return at once.
        images: total over all items.
        actors: upper limit; fewer where the cluster does not hold so many.
        resources: of each actor; None takes those of a training's worker.
        items_of_an_actor: items that an actor processes at the same time, in threads; more than one where the work
            takes turns at the device, so that one item is read and another one stored meanwhile.

    Returns:
        The results, in the order of the items.

    Raises:
        UserError: the cluster can't hold a single actor.
    """
    workers, progress = run.config.workers, ProgressActor()
    resources = Resources.of(workers) if resources is None else resources
    actors = min(actors, len(items), len(items) if workers.wait_for_nodes else max_actors(job, resources))
    # A lost actor is restarted and processes its item again.
    actor = ray.remote(
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        max_restarts=workers.max_failures,
        max_task_retries=workers.max_failures,
    )(Worker).options(max_concurrency=items_of_an_actor)
    with monitor_progress(run, job, progress, images):
        return _process(items, [actor.remote(make_work, workers, progress) for _ in range(actors)] * items_of_an_actor)


def _process(items: Sequence[Any], actors: Sequence[Any]) -> list[Any]:
    """Give every actor an item, and the next one as soon as it is free; returns the results in the order of the items.

    After an error no item is given, and what the others are at is waited for: none is killed in the middle of a file.
    What an actor has that waits for its node is taken back.
    """
    left, running, failed = enumerate(items), dict[Any, tuple[int, Any]](), None
    results: dict[int, Any] = {}
    for actor, (index, item) in zip(actors, left, strict=False):
        running[actor.do.remote(item)] = index, actor
    while running:
        (done, *_), _ = ray.wait([*running])
        index, actor = running.pop(done)
        try:
            results[index] = ray.get(done)
        except ray.exceptions.RayError as error:
            if failed is None:
                failed = error
                for task in running:
                    ray.cancel(task)  # which ends those that have not begun, and none that has
        if failed is None:
            running.update((actor.do.remote(item), (index, actor)) for index, item in islice(left, 1))
    if failed is not None:
        raise failed
    return [results[index] for index in range(len(items))]


def max_actors(job: Job, resources: Resources) -> int:
    """Number of actors that the cluster holds at once: one more would be given an item, and wait with it forever.

    Raises:
        UserError: not a single one.
    """
    wanted = {kind: amount for kind, amount in (("CPU", resources.cpus), ("GPU", resources.gpus)) if amount}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    count = sum(min(int(node.get(kind, 0) / amount) for kind, amount in wanted.items()) for node in nodes)
    if not count:
        needs = " and ".join(f"{amount:g} {kind}s" for kind, amount in wanted.items())
        raise UserError(
            f"{job}: an actor needs {needs} of one node and none has so many; lower them, add nodes, or set "
            "workers.wait_for_nodes=true"
        )
    return count
