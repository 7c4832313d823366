"""Looking at a training from the side. Whoever looks changes nothing of it and draws from no generator of its own."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

from vavae.data.grid import png_bytes
from vavae.distributed.world import World
from vavae.interop.export import strip_prefix
from vavae.storage.storage import Storage
from vavae.training.logging.log import MetricsLog
from vavae.training.step import Step

ModuleT = TypeVar("ModuleT", bound=nn.Module)

PREVIEWS = "previews"
"""Folder of the pictures of a training."""


class Callback(Protocol):
    """Something that looks at the model at intervals."""

    every_images: int
    """Images between two looks."""

    def on_interval(self, step: Step, images_seen: int, log: MetricsLog) -> None:
        """Look at the model of a step, and log what is seen. Every rank calls it."""


def exported_weights(step: Step, engine: str) -> dict[str, Tensor]:
    """The state dict that would be exported now: the average where there is one. On the CPU; every rank calls it."""
    return step.engines[engine].weights() if step.ema is None else step.ema.weights()


def exported_module(step: Step, engine: str, prefix: str, build: Callable[[], ModuleT], world: World) -> ModuleT | None:
    """The model that would be exported now, in a module of its own on rank 0's device. Every rank calls it.

    Args:
        step: that trains it.
        engine: that holds its weights.
        prefix: of its names in them.
        build: makes the module; on the meta device, where nothing is initialized, so nothing is drawn.
        world: the ranks.
    """
    weights = exported_weights(step, engine)
    if not world.is_first:
        return None
    with torch.device("meta"):
        module = build()
    module.load_state_dict(strip_prefix(prefix, weights), assign=True)
    return module.eval().requires_grad_(False).to(world.device)


def save_preview(folder: Storage, images_seen: int, name: str, picture: Image, log: MetricsLog) -> None:
    """Put a picture into the folder, named by the images seen, and show it in TensorBoard."""
    folder.write_bytes(f"{images_seen:012d}.png", png_bytes(picture))
    log.picture(images_seen, name, picture)
