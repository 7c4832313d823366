"""Metrics of evaluated checkpoints, in one file each beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vavae.runs.checkpoints import checkpoint_name, find_checkpoints
from vavae.runs.training_config import LightningDiTTrainingConfig
from vavae.storage.storage import Storage

EVALUATIONS = "measures"
"""Folder of the metrics of checkpoints within that of a training."""
_DISTANCE = "generation_frechet_distance"


class CheckpointMetrics:
    """Checkpoints that are to be evaluated, and the metrics of those that were.

    Args:
        training: folder of the training.
        every_images: images between two checkpoints that are evaluated.
        batch_size: images of a step; the first step to reach a multiple of `every_images` is due.
    """

    def __init__(self, training: Storage, every_images: int, batch_size: int) -> None:
        self._training, self._storage = training, training.child(EVALUATIONS)
        self._every_images, self._batch_size = every_images, batch_size
        self._known: dict[int, dict[str, Any]] = {}

    @classmethod
    def of(cls, training: Storage, config: LightningDiTTrainingConfig) -> "CheckpointMetrics | None":
        """Open the metrics of a LightningDiT's training; None where its checkpoints are not evaluated.

        Args:
            training: folder of the training.
            config: its section of the configuration.
        """
        return None if config.measure is None else cls(training, config.measure.every_images, config.batch_size)

    def is_due(self, images_seen: int) -> bool:
        """Return whether a checkpoint of this moment is to be evaluated."""
        return max(images_seen - self._batch_size, 0) // self._every_images < images_seen // self._every_images

    def awaits(self, images_seen: int) -> bool:
        """Return whether a checkpoint of this moment waits: it is due, and was neither evaluated nor skipped."""
        return self.is_due(images_seen) and images_seen not in self.found()

    def waiting(self) -> list[int]:
        """Images seen at the committed checkpoints that wait to be evaluated, oldest first."""
        return [seen for seen in find_checkpoints(self._training) if self.awaits(seen)]

    def found(self) -> dict[int, dict[str, Any]]:
        """Metrics by images seen, each with its value and protocol by name; none of a skipped checkpoint."""
        for path in self._storage.list():
            seen = int(Path(path).stem)
            if seen not in self._known:
                self._known[seen] = self._storage.read_json(path)
        return self._known

    def values(self) -> dict[int, dict[str, float]]:
        """Values of the metrics by images seen and by name."""
        return {seen: {name: each["value"] for name, each in metrics.items()} for seen, metrics in self.found().items()}

    def summary(self) -> str:
        """Count and best of the evaluated checkpoints, in words."""
        distances = {seen: row[_DISTANCE] for seen, row in self.values().items() if _DISTANCE in row}
        skipped = len(self.found()) - len(distances)
        words = f"{len(distances)} evaluated" + (f", {skipped} skipped" if skipped else "")
        if not distances:
            return words
        best = min(distances, key=distances.__getitem__)
        return f"{words}; best {_DISTANCE} {distances[best]:.4g} after {best:,} images"

    def write(self, images_seen: int, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """Store the metrics of a checkpoint; none, of one that is skipped."""
        self._storage.write_json(f"{checkpoint_name(images_seen)}.json", dict(metrics))
