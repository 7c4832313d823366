"""Looking at a training from the side. Whoever looks changes nothing of it and draws from no generator of its own."""

from typing import Protocol

from torch import Tensor

from vavae.training.log import MetricsLog
from vavae.training.step import Step


class Observer(Protocol):
    """Something that looks at the model at intervals."""

    every_images: int
    """Images between two looks."""

    def observe(self, step: Step, images_seen: int, log: MetricsLog) -> None:
        """Look at the model of a step, and log what is seen. Every rank calls it."""


def exported_weights(step: Step, engine: str) -> dict[str, Tensor]:
    """The state dict that would be exported now: the average where there is one. On the CPU; every rank calls it."""
    return step.engines[engine].weights() if step.ema is None else step.ema.weights()
