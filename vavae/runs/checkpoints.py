"""Places of a training's checkpoints in storage, for whoever finds them without the training."""

from vavae.storage.artifact import read
from vavae.storage.storage import Storage

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints within that of a training."""
EMA = "ema"
"""Set of weights of the average that is exported, in a checkpoint."""
TRAINED = "lightningdit"
"""Set of the weights of a LightningDiT as they are trained, in a checkpoint; the optimizer's state is in it, too."""


def checkpoint_name(images_seen: int) -> str:
    """Name of a checkpoint's folder."""
    return f"{images_seen:012d}"


def find_checkpoints(training: Storage) -> list[int]:
    """Images seen at the committed checkpoints of a training, oldest first."""
    checkpoints = training.child(CHECKPOINTS)
    names = [name for name in checkpoints.list() if name.isdecimal()]  # a lease lies beside them
    return [int(name) for name in names if read(checkpoints, name) is not None]


def average_set(name: str | None) -> str:
    """Name of an average's set of weights in a checkpoint; None is the one that is exported."""
    return EMA if name is None else f"{EMA}-{name}"
