"""Between data that a network predicts and the velocity that leads there (JiT, arXiv 2511.13720).

Time runs from noise (t = 0) to data (t = 1). Both functions compute in float32, or float64 where x is.
"""

import torch
from torch import Tensor


def velocity_to_data(data: Tensor, x: Tensor, t: Tensor, floor: float) -> Tensor:
    """Velocity (data - x) / max(1 - t, floor) that leads from x at t to the data, float [B, C, H, W].

    Args:
        data: data, predicted or true, [B, C, H, W] of any float dtype.
        x: point on the path, [B, C, H, W].
        t: timesteps [B] in [0, 1].
        floor: least divisor, so that errors near the data do not count without bound; 0 is for t < 1 alone.
    """
    x = _at_least_float32(x)
    return (data.to(x.dtype) - x) / _distance(x, t, floor)


def data_of_velocity(velocity: Tensor, x: Tensor, t: Tensor, floor: float) -> Tensor:
    """Data that a velocity of :func:`velocity_to_data` leads to, float [B, C, H, W], for the same x, t and floor."""
    x = _at_least_float32(x)
    return x + _distance(x, t, floor) * velocity.to(x.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _distance(x: Tensor, t: Tensor, floor: float) -> Tensor:
    return (1 - t.to(x.dtype)).clamp(min=floor).view(-1, 1, 1, 1)
