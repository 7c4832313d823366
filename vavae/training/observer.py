"""Looking at a training from the side. Whoever looks changes nothing of it and draws from no generator of its own."""

from typing import Protocol

from PIL.Image import Image
from torch import Tensor

from vavae.data.grid import png_bytes
from vavae.storage.storage import Storage
from vavae.training.log import MetricsLog
from vavae.training.step import Step

PREVIEWS = "previews"
"""Folder of the pictures of a training."""


class Observer(Protocol):
    """Something that looks at the model at intervals."""

    every_images: int
    """Images between two looks."""

    def observe(self, step: Step, images_seen: int, log: MetricsLog) -> None:
        """Look at the model of a step, and log what is seen. Every rank calls it."""


def exported_weights(step: Step, engine: str) -> dict[str, Tensor]:
    """The state dict that would be exported now: the average where there is one. On the CPU; every rank calls it."""
    return step.engines[engine].weights() if step.ema is None else step.ema.weights()


def keep_preview(folder: Storage, images_seen: int, name: str, picture: Image, log: MetricsLog) -> None:
    """Put a picture into the folder, named by the images seen, and show it in TensorBoard."""
    folder.write_bytes(f"{images_seen:012d}.png", png_bytes(picture))
    log.picture(images_seen, name, picture)
