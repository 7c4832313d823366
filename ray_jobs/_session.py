"""The training loop's session under Ray Train."""

from collections.abc import Mapping

import ray.train

from ray_jobs._board import Board
from vavae.progress import Progress


class RaySession:
    """Speaks to the driver through the board, and to Ray Train through its reports."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._first = ray.train.get_context().get_world_rank() == 0

    def progress(self, progress: Progress) -> None:
        """See `Session.progress`."""
        self._board.post(progress)

    def checkpoint(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """See `Session.checkpoint`. Our own commit record says what a checkpoint is, so Ray gets the metrics alone."""
        ray.train.report({"images_seen": images_seen, **metrics})

    def stop_requested(self) -> bool:
        """See `Session.stop_requested`."""
        return self._first and self._board.stop_requested()
