"""What was measured of a training's checkpoints while it went on: one file each, beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vavae.runs.run import Run
from vavae.storage.artifact import read
from vavae.storage.storage import Storage

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints within that of a training."""
MEASURES = "measures"
"""Folder of what was measured of them."""
_DISTANCE = "generation_frechet_distance"


def checkpoint_name(images_seen: int) -> str:
    """The folder of a checkpoint in that of all."""
    return f"{images_seen:012d}"


class CheckpointMetrics:
    """Which checkpoints are to be measured, and what came out.

    Args:
        training: folder of the training.
        every_images: images between two checkpoints that are measured.
        batch_size: images of a step; the first step to reach a multiple of `every_images` is due.
    """

    def __init__(self, training: Storage, every_images: int, batch_size: int) -> None:
        self._checkpoints, self._storage = training.child(CHECKPOINTS), training.child(MEASURES)
        self._every_images, self._batch_size = every_images, batch_size
        self._known: dict[int, dict[str, Any]] = {}

    @classmethod
    def of(cls, run: Run) -> "CheckpointMetrics | None":
        """Those of a run's LightningDiT; None where its checkpoints are not measured."""
        training = run.config.train_lightningdit
        if training.measure is None:
            return None
        folder = run.storage.child(run.training_prefix("train_lightningdit"))
        return cls(folder, training.measure.every_images, training.batch_size)

    def is_due(self, images_seen: int) -> bool:
        """Whether a checkpoint of this moment is to be measured."""
        return max(images_seen - self._batch_size, 0) // self._every_images < images_seen // self._every_images

    def awaits(self, images_seen: int) -> bool:
        """Whether a checkpoint of this moment is to be measured and has been neither measured nor skipped."""
        return self.is_due(images_seen) and images_seen not in self.found()

    def waiting(self) -> list[int]:
        """Images seen at the committed checkpoints that wait to be measured, oldest first."""
        there = [int(name) for name in self._checkpoints.list() if read(self._checkpoints, name) is not None]
        return [seen for seen in there if self.awaits(seen)]

    def found(self) -> dict[int, dict[str, Any]]:
        """What was measured, by images seen: figures by name, with their protocols; nothing where it was skipped."""
        for path in self._storage.list():
            seen = int(Path(path).stem)
            if seen not in self._known:
                self._known[seen] = self._storage.read_json(path)
        return self._known

    def values(self) -> dict[int, dict[str, float]]:
        """The bare figures."""
        return {seen: {name: each["value"] for name, each in figures.items()} for seen, figures in self.found().items()}

    def summary(self) -> str:
        """How many there are, and which is the best, in words."""
        distances = {seen: row[_DISTANCE] for seen, row in self.values().items() if _DISTANCE in row}
        skipped = len(self.found()) - len(distances)
        words = f"{len(distances)} measured" + (f", {skipped} skipped" if skipped else "")
        if not distances:
            return words
        best = min(distances, key=distances.__getitem__)
        return f"{words}; best {_DISTANCE} {distances[best]:.4g} after {best:,} images"

    def write(self, images_seen: int, figures: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep what was measured; no figures, of one that is skipped."""
        self._storage.write_json(f"{checkpoint_name(images_seen)}.json", dict(figures))
