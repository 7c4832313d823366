"""The straight path. Time runs from noise (t = 0) to data (t = 1); velocity = data - noise."""

from typing import NamedTuple

from torch import Tensor


class PathSample(NamedTuple):
    """A point on the path from noise to data, and the direction there."""

    x_t: Tensor
    """[B, C, H, W]"""
    velocity: Tensor
    """dx/dt, [B, C, H, W]"""


class LinearPath:
    """x_t = t · data + (1 - t) · noise (rectified flow, arXiv 2209.03003)."""

    @staticmethod
    def sample(data: Tensor, noise: Tensor, t: Tensor) -> PathSample:
        """The path at t [B] for normalized latents and unit Gaussian noise, both [B, C, H, W]; exact at both ends."""
        weight = t.to(data.dtype).view(-1, 1, 1, 1)
        return PathSample(weight * data + (1 - weight) * noise, data - noise)
