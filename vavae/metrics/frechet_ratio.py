"""Fréchet distances over several networks at once, each in units of the distance of real images (FDr)."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from vavae.errors import UserError


class FrechetRatios(NamedTuple):
    """Fréchet distances over those of real images."""

    ratios: dict[str, float]
    """Ratio by extractor; 1 is as far from the reference as real images are."""
    mean: float
    """Arithmetic mean of the ratios, whatever their order."""


def frechet_ratios(distances: Mapping[str, float], divisors: Mapping[str, float]) -> FrechetRatios:
    """Divide distances by those of real images, and average the ratios.

    Args:
        distances: Fréchet distance of generated images by extractor, one or more.
        divisors: that of real images through the same extractors.

    Raises:
        UserError: a divisor is not above 0.
    """
    assert distances.keys() == divisors.keys(), f"{[*distances]} over {[*divisors]}"
    for name, divisor in divisors.items():
        if not divisor > 0:
            raise UserError(
                f"evaluate.frechet_ratio: real images lie at a distance of {divisor:g} from the reference through "
                f"{name}, which cannot divide: give frechet_ratio.divisors, or training and held-out images that differ"
            )
    ratios = {name: distance / divisors[name] for name, distance in distances.items()}
    return FrechetRatios(ratios, math.fsum(ratios.values()) / len(ratios))
