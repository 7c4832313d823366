"""Flow matching on the straight path between noise and data: the path, the law of the timesteps, and the losses.

Time runs from noise (t = 0) to data (t = 1); velocity = data - noise.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vavae.diffusion.config import TIMESTEP_BINS, ObjectiveConfig, TimestepConfig
from vavae.diffusion.shift import shift_times


class PathSample(NamedTuple):
    """A point on the path from noise to data, and the direction there."""

    x_t: Tensor
    """Point on the path, [B, C, H, W]."""
    velocity: Tensor
    """Direction dx/dt, [B, C, H, W]."""


class LinearPath:
    """The path x_t = t · data + (1 - t) · noise (rectified flow, arXiv 2209.03003)."""

    @staticmethod
    def sample(data: Tensor, noise: Tensor, t: Tensor) -> PathSample:
        """Point and velocity at t [B] for normalized latents and unit noise, both [B, C, H, W]; exact at both ends."""
        weight = t.to(data.dtype).view(-1, 1, 1, 1)
        return PathSample(weight * data + (1 - weight) * noise, data - noise)


def sample_timesteps(
    config: TimestepConfig, batch_size: int, images_seen: int, rng: torch.Generator, dimension: int
) -> Tensor:
    """Draw timesteps float32 [batch_size] in [0, 1], on the device of the rng, for latents of `dimension` numbers.

    Logit-normal timesteps (SD3, arXiv 2403.03206, section 3.1) dwell in the middle of the path, where the
    velocity is hardest to predict; images_seen decides whether the law has been switched to uniform.
    """
    switched = config.uniform_after_images is not None and images_seen >= config.uniform_after_images
    if switched or config.law == "uniform":
        drawn = torch.rand(batch_size, generator=rng, device=rng.device)
    else:
        normal = torch.randn(batch_size, generator=rng, device=rng.device)
        drawn = torch.sigmoid(config.mean + config.std * normal)
    return shift_times(drawn, config.shift, dimension).clamp(max=1)  # rounding leads beyond the data


class FlowMatchingLosses(NamedTuple):
    """Losses per sample, all float32 [B]."""

    velocity: Tensor
    """Mean squared error over channels and positions: the loss of public logs."""
    direction: Tensor
    """1 - cosine over the channels, averaged over positions, in [0, 2]."""
    total: Tensor
    """Sum velocity + direction_weight · direction + intermediate_weight · intermediate."""
    intermediate: Tensor | None = None
    """Mean squared error of the velocity of an inner block; None where none is predicted."""


class FlowMatchingObjective:
    """Velocity matching with the velocity direction loss (arXiv 2501.01423, table 1; FasterDiT, arXiv 2410.10356).

    A model whose output starts at zero meets the cosine where its gradient is 1 / eps = 1e8 (so does the released
    code). Clip gradients: otherwise Adam's second moment remembers that step for a hundred others.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.direction_weight, self.intermediate_weight = config.direction_weight, config.intermediate_weight
        self.data_floor = config.data_floor

    def __call__(self, prediction: Tensor, velocity: Tensor, intermediate: Tensor | None = None) -> FlowMatchingLosses:
        """Compare predicted and true velocities [B, C, H, W] of any float dtype; that of an inner block, too."""
        prediction, velocity = prediction.float(), velocity.float()
        squared = (prediction - velocity).square().flatten(1).mean(1)
        direction = (1 - F.cosine_similarity(prediction, velocity, dim=1)).flatten(1).mean(1)
        total = squared + self.direction_weight * direction
        if intermediate is None:
            return FlowMatchingLosses(squared, direction, total)
        of_intermediate = (intermediate.float() - velocity).square().flatten(1).mean(1)
        return FlowMatchingLosses(
            squared, direction, total + self.intermediate_weight * of_intermediate, of_intermediate
        )


class TimestepBins(NamedTuple):
    """Sums that add up over batches and ranks; total / samples is the mean loss of each part of [0, 1]."""

    total: Tensor
    """Sum of losses, float32 [TIMESTEP_BINS]."""
    samples: Tensor
    """Number of samples, float32 [TIMESTEP_BINS]."""


def bin_by_timestep(losses: Tensor, t: Tensor) -> TimestepBins:
    """Sort losses [B] by their timesteps t [B] into equal bins, each closed below; t = 1 falls into the last."""
    index = (t * TIMESTEP_BINS).long().clamp(max=TIMESTEP_BINS - 1)
    bins = torch.arange(TIMESTEP_BINS, device=t.device)
    member = (index[:, None] == bins).float()  # [B, bins]; a sum without atomics is deterministic
    return TimestepBins(losses.detach().float() @ member, member.sum(0))
