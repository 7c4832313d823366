"""Classifier-free guidance (arXiv 2207.12598). Time runs from noise (t = 0) to data (t = 1)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vavae.diffusion.config import GuidanceConfig

LabelledVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""velocity(x [B, C, H, W], t [B], y int64 [B]) -> [B, C, H, W], for example a LightningDiT."""


def drop_labels(labels: Tensor, null_label: int, probability: float, generator: torch.Generator) -> Tensor:
    """Labels [B] with each replaced by the null label with a probability, so that one model learns both velocities."""
    dropped = torch.rand(labels.shape, generator=generator, device=generator.device) < probability
    return labels.masked_fill(dropped.to(labels.device), null_label)


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """velocity(x, t) of a labelled model for given labels: v = v_null + scale · (v_label - v_null).

    Outside the interval, and with scale 1, it is v_label alone and the null label is not evaluated.
    """

    model: LabelledVelocity
    labels: Tensor
    """int64 [B]"""
    null_label: int
    config: GuidanceConfig

    def active(self, t: float) -> bool:
        """Whether time t is guided; the bounds are compared in the float32 that timesteps have."""
        low, high = torch.tensor(self.config.interval, dtype=torch.float32).tolist()
        return self.config.scale != 1 and low <= t <= high

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Velocity at x [B, C, H, W], all samples at the same time t."""
        times = torch.full((len(x),), t, device=x.device)
        if not self.active(t):
            return self.model(x, times, self.labels)
        both = torch.cat([self.labels, torch.full_like(self.labels, self.null_label)])
        labelled, null = self.model(torch.cat([x, x]), torch.cat([times, times]), both).chunk(2)
        channels = self.config.channels
        guided = null[:, :channels] + self.config.scale * (labelled[:, :channels] - null[:, :channels])
        return guided if channels is None else torch.cat([guided, labelled[:, channels:]], dim=1)
