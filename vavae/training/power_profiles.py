"""Power profiles of averages, and the sum of some that is nearest to another (arXiv 2312.02696, section 3.2, C).

The profile of an average after T images is the weight that it gives to what the training had at x images:
p(x) = (γ + 1) x^γ / T^(γ + 1) on [0, T]. All here is float64.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class PowerProfile(NamedTuple):
    """Profile of an average."""

    images_seen: int
    """T, the images behind the last weights in it."""
    std: float
    """Standard deviation of the profile relative to T."""


class ProfileSum(NamedTuple):
    """Weighted sum of profiles in place of another one."""

    coefficients: Tensor
    """Weight of each, float64 [N]; their sum is 1."""
    error: float
    """Norm of the difference from the other, relative to that one's."""

    @property
    def amplification(self) -> float:
        """Factor by which rounding of the averages grows in the sum."""
        return self.coefficients.abs().sum().item()


@cache
def exponent_of(std: float) -> float:
    """The exponent γ > 0 of a relative standard deviation: std² = (γ + 1) / ((γ + 2)² (γ + 3)), by bisection."""
    low, high = 0.0, 1.0 / std  # the right side is below 1 / (γ + 2)²
    for _ in range(100):
        middle = (low + high) / 2
        if (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > std**2:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def power_decay(std: float, batch_size: int, images_seen: int) -> float:
    """Decay (1 - batch / images seen)^(γ + 1) of an update that keeps the profile; 0 for the first.

    Args:
        std: relative standard deviation.
        batch_size: images of a step.
        images_seen: with those of the step whose weights are averaged.
    """
    return (1 - batch_size / images_seen) ** (exponent_of(std) + 1)


def nearest_sum(profiles: Sequence[PowerProfile], wished: PowerProfile) -> ProfileSum:
    """The sum of profiles that is nearest to another one, by least squares, scaled to coefficients that sum to 1.

    Args:
        profiles: different ones, N.
        wished: the profile to approximate.
    """
    matrix = torch.tensor([[_inner_product(a, b) for b in profiles] for a in profiles], dtype=torch.float64)
    projections = torch.tensor([_inner_product(a, wished) for a in profiles], dtype=torch.float64)
    coefficients = torch.linalg.solve(matrix, projections)
    coefficients = coefficients / coefficients.sum()
    square = _inner_product(wished, wished)
    difference = square - 2 * coefficients @ projections + coefficients @ matrix @ coefficients
    return ProfileSum(coefficients, math.sqrt(max(0.0, difference.item()) / square))


def _inner_product(one: PowerProfile, other: PowerProfile) -> float:
    """Integral of the product of two profiles, in powers of ratios, for those of images overflow."""
    first, second = exponent_of(one.std), exponent_of(other.std)
    shorter, longer = sorted((one.images_seen, other.images_seen))
    ratios = (shorter / one.images_seen) ** first * (shorter / other.images_seen) ** second
    return (first + 1) * (second + 1) / (first + second + 1) * ratios / longer
