"""A pool of actors that each load what they need once and then take one item after another."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
import torch
from ray.util import ActorPool

from ray_jobs._board import Board, shown
from vavae.training.run import Job, Run

ItemT = TypeVar("ItemT")
Advance = Callable[[int], None]
Work = Callable[[Any, Advance], None]
"""Does one item; tells how many images it has done since the last time."""


class _Worker:
    def __init__(self, make_work: Callable[[Run], Work], run: Run, board: Board) -> None:
        torch.set_num_threads(run.config.workers.threads)
        self._work, self._board = make_work(run), board

    def do(self, item: Any) -> None:
        self._work(item, self._board.advance)


def work_through(
    run: Run, job: Job, make_work: Callable[[Run], Work], items: Sequence[ItemT], images: int, actors: int
) -> None:
    """Do all items with at most `actors` at a time, showing progress in images.

    Args:
        run: handed to `make_work`.
        job: name for the progress.
        make_work: called once in every actor, to load models and open storage.
        items: what is to be done, each on its own; done ones return at once.
        images: how many images all items have together.
        actors: how many work at the same time.
    """
    workers, board = run.config.workers, Board()
    # A lost actor comes back and does its item again; items that are done return at once.
    actor = ray.remote(
        num_cpus=workers.cpus,
        num_gpus=1 if workers.use_gpu else 0,
        max_restarts=workers.max_failures,
        max_task_retries=workers.max_failures,
    )(_Worker)
    with shown(board, job, images):
        pool = ActorPool([actor.remote(make_work, run, board) for _ in range(min(actors, len(items)))])
        for _ in pool.map_unordered(lambda worker, item: worker.do.remote(item), list(items)):
            pass
