"""The straight path between noise and data. Time runs from noise (t = 0) to data (t = 1); velocity = data - noise."""

from typing import NamedTuple

from torch import Tensor


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
