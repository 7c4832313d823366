"""A pool of actors that each load what they need once and then take one item after another."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import ray
from ray.util import ActorPool

from ray_jobs.runtime.progress_actor import Board
from ray_jobs.runtime.progress_monitor import watched
from vavae.distributed.torch_settings import configure_torch
from vavae.errors import UserError
from vavae.runs.run import Job, Run

ItemT = TypeVar("ItemT")
Advance = Callable[[int], None]
Work = Callable[[Any, Advance], None]
"""Does one item; tells how many images it has done since the last time."""


class Share(NamedTuple):
    """What one actor takes of a cluster."""

    cpus: float
    gpus: float

    @staticmethod
    def of(run: Run, cpus: float | None = None, gpus: float | None = None) -> "Share":
        """What a worker of the training takes unless told otherwise; GPUs only where the run uses them."""
        workers = run.config.workers
        gpus = workers.gpus if gpus is None else gpus
        return Share(workers.cpus if cpus is None else cpus, gpus if workers.use_gpu else 0)

    @staticmethod
    def beside(run: Run) -> "Share":
        """What measuring checkpoints takes besides the workers; nothing where it is done after them, or not at all."""
        measure = run.config.train_lightningdit.measure
        if measure is None or measure.when == "after":
            return NOTHING
        return Share.of(run, measure.cpus, measure.gpus)


NOTHING = Share(0, 0)
"""The share of who does not work."""


class _Worker:
    def __init__(self, make_work: Callable[[Run], Work], run: Run, board: Board) -> None:
        configure_torch(run.config.workers)
        self._work, self._board = make_work(run), board

    def do(self, item: Any) -> None:
        self._work(item, self._board.advance)


def work_through(
    run: Run,
    job: Job,
    make_work: Callable[[Run], Work],
    items: Sequence[ItemT],
    images: int,
    actors: int,
    share: Share | None = None,
) -> None:
    """Do all items with at most `actors` at a time, showing progress in images.

    Args:
        run: handed to `make_work`.
        job: name for the progress.
        make_work: called once in every actor, to load models and open storage.
        items: what is to be done, each on its own; done ones return at once.
        images: how many images all items have together.
        actors: how many work at the same time, where the cluster has room for so many.
        share: what each of them takes; None is what a worker of the training takes.

    Raises:
        UserError: the cluster has no room for a single one.
    """
    share = Share.of(run) if share is None else share
    workers, board = run.config.workers, Board()
    actors = min(actors, len(items), len(items) if workers.wait_for_nodes else _room(job, share))
    # A lost actor comes back and does its item again; items that are done return at once.
    actor = ray.remote(
        num_cpus=share.cpus,
        num_gpus=share.gpus,
        max_restarts=workers.max_failures,
        max_task_retries=workers.max_failures,
    )(_Worker)
    with watched(run, job, board, images):
        pool = ActorPool([actor.remote(make_work, run, board) for _ in range(actors)])
        for _ in pool.map_unordered(lambda worker, item: worker.do.remote(item), list(items)):
            pass


def _room(job: Job, share: Share) -> int:
    """Actors that the cluster holds at once: one more would be given an item, and wait with it for ever."""
    wanted = {kind: amount for kind, amount in (("CPU", share.cpus), ("GPU", share.gpus)) if amount}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(node.get(kind, 0) / amount) for kind, amount in wanted.items()) for node in nodes)
    if not room:
        needs = " and ".join(f"{amount:g} {kind}s" for kind, amount in wanted.items())
        raise UserError(
            f"{job}: an actor needs {needs} of one node and none has so many; lower them, add nodes, or set "
            "workers.wait_for_nodes=true"
        )
    return room
