"""Snapshots of averages by power profiles, kept from a training so that others can be reconstructed after it."""

from collections.abc import Sequence

from vavae.runs.checkpoints import average_set
from vavae.runs.training_config import LightningDiTTrainingConfig
from vavae.storage.artifact import RECORD, discard, is_intact, read
from vavae.storage.storage import Storage

SNAPSHOTS = "snapshots"
"""Folder of the snapshots within that of a training; each is a checkpoint of some averages alone."""


class AverageSnapshots:
    """Snapshots of a training's averages by power profiles.

    Args:
        training: folder of the training.
        averages: names of the averages.
        every_images: images between two snapshots.
        batch_size: images of a step; the first step to reach a multiple of `every_images` is due.
    """

    def __init__(self, training: Storage, averages: Sequence[str], every_images: int, batch_size: int) -> None:
        self.storage = training.child(SNAPSHOTS)
        """Folder of the snapshots."""
        self.sets = [average_set(name) for name in averages]
        """Sets of weights of a checkpoint that a snapshot holds."""
        self._every_images, self._batch_size = every_images, batch_size

    @classmethod
    def of(cls, training: Storage, config: LightningDiTTrainingConfig) -> "AverageSnapshots | None":
        """Open the snapshots of a LightningDiT's training; None where it keeps none.

        Args:
            training: folder of the training.
            config: its section of the configuration.
        """
        if config.average_snapshot_images is None:
            return None
        names = [average.name for average in config.power_averages]
        return cls(training, names, config.average_snapshot_images, config.batch_size)

    def is_due(self, images_seen: int) -> bool:
        """Return whether there is to be a snapshot of this moment."""
        return max(images_seen - self._batch_size, 0) // self._every_images < images_seen // self._every_images

    def prune(self, newest: str) -> None:
        """Delete snapshots that lie ahead of the newest checkpoint, and what other attempts have left beside it."""
        for name in self.storage.list():
            if name > newest:
                discard(self.storage, name)
        record = read(self.storage, newest)
        if record is None:
            return
        kept = {RECORD, *(file.split("/")[0] for file in record.files)}
        for path in self.storage.list(newest):
            if path.rpartition("/")[2] not in kept:
                self.storage.delete(path)


def find_snapshots(training: Storage) -> list[int]:
    """Images seen at the committed snapshots of a training whose files are all there, oldest first."""
    storage = training.child(SNAPSHOTS)
    records = {name: read(storage, name) for name in storage.list()}
    return [int(name) for name, record in records.items() if record is not None and is_intact(storage, name, record)]
