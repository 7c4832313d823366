"""Callbacks of a training, which change nothing of it and draw from no random generator of its own."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from vavae.distributed.world import World
from vavae.interop.export import strip_prefix
from vavae.training.logging.log import MetricsLog
from vavae.training.step import Step

ModuleT = TypeVar("ModuleT", bound=nn.Module)

PREVIEWS = "previews"
"""Folder of a training's preview pictures."""


class Callback(Protocol):
    """Function of the model that is called at intervals of images seen."""

    every_images: int
    """Images between two calls."""

    def on_interval(self, step: Step, images_seen: int, log: MetricsLog) -> None:
        """Inspect the model of a step, and log the findings. Every rank calls it."""


def exported_weights(step: Step, engine: str) -> dict[str, Tensor]:
    """Gather the state dict that would be exported now, the average where there is one, on the CPU of rank 0.

    Every rank calls it. It is empty on the others.
    """
    return step.engines[engine].weights() if step.ema is None else step.ema.weights()


def exported_module(step: Step, engine: str, prefix: str, build: Callable[[], ModuleT], world: World) -> ModuleT | None:
    """Build the model that would be exported now, a module of its own on rank 0's device. Every rank calls it.

    Args:
        step: step that trains it.
        engine: name of the engine that holds its weights.
        prefix: prefix of its names in them.
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
