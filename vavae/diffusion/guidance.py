"""Classifier-free and internal guidance. Time runs from noise (t = 0) to data (t = 1)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vavae.diffusion.config import GuidanceConfig

LabeledVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function velocity(x [B, C, H, W], t [B], y int64 [B]) -> [B, C, H, W], for example a LightningDiT."""

Predict = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None, Tensor | None]]
"""Function of the same arguments to the velocity, that of an inner block, and tokens, as `LightningDiT.predict`."""


def drop_labels(labels: Tensor, null_label: int, probability: float, rng: torch.Generator) -> Tensor:
    """Replace each label of int64 [B] by the null label with a probability; one model then learns both velocities."""
    dropped = torch.rand(labels.shape, generator=rng, device=rng.device) < probability
    return labels.masked_fill(dropped.to(labels.device), null_label)


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """The guided velocity of a labeled model: v = v_null + scale · (v_label - v_null) (arXiv 2207.12598).

    Outside the interval, and with scale 1, it is v_label alone and the null label is not evaluated.
    """

    model: LabeledVelocity
    null_label: int
    config: GuidanceConfig

    @property
    def jumps(self) -> list[float]:
        """Times between 0 and 1 at which guidance sets in or ends, ascending."""
        config = self.config
        ends = [*config.interval] * (config.scale != 1) + [*config.internal_interval] * (config.internal_scale != 1)
        bounds = torch.tensor(ends, dtype=torch.float32).tolist()
        return sorted({bound for bound in bounds if 0 < bound < 1})

    def active(self, t: Tensor) -> Tensor:
        """Mask bool [B] of the times t [B] that are guided; bounds are compared in float32, as timesteps are."""
        low, high = torch.tensor(self.config.interval, dtype=torch.float32, device=t.device)
        return (low <= t) & (t <= high) & (self.config.scale != 1)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity at x [B, C, H, W], times t [B] and labels y int64 [B].

        Which images are guided is found out where t is: on the CPU that keeps no GPU waiting.
        """
        guided = self.active(t).nonzero().flatten().to(x.device)
        t = t.to(x.device)
        if not len(guided):
            return self.model(x, t, y)
        null = torch.full_like(y[guided], self.null_label)
        both = self.model(torch.cat([x, x[guided]]), torch.cat([t, t[guided]]), torch.cat([y, null]))
        labeled, unlabeled = both.split([len(x), len(guided)])
        part = (guided, slice(self.config.channels))
        velocity, v_null = labeled.clone(), unlabeled[:, : self.config.channels]
        velocity[part] = v_null + self.config.scale * (labeled[part] - v_null)
        return velocity


@dataclass(frozen=True)
class InternalGuidance:
    """The velocity v + (scale - 1) · (v - v_mid), for each label by itself, v_mid of an inner block (arXiv 2512.24176).

    Outside the interval it is v.
    """

    predict: Predict
    config: GuidanceConfig

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity at x [B, C, H, W], times t [B] and labels y int64 [B]."""
        velocity, intermediate, _ = self.predict(x, t, y)
        assert intermediate is not None, "the model has an intermediate head"
        low, high = torch.tensor(self.config.internal_interval, dtype=torch.float32, device=t.device)
        excess = (self.config.internal_scale - 1) * ((low <= t) & (t <= high))
        return velocity + excess.view(-1, 1, 1, 1).to(velocity.dtype) * (velocity - intermediate)


def guided(predict: Predict, null_label: int, config: GuidanceConfig) -> ClassifierFreeGuidance:
    """Velocity of a model under all guidance that a configuration asks for."""

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return predict(x, t, y)[0]

    model = velocity if config.internal_scale == 1 else InternalGuidance(predict, config)
    return ClassifierFreeGuidance(model, null_label, config)
