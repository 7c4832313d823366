"""The shift of times by t' = s t / (1 + (s - 1) t), of a solver's grid and of the timesteps that are trained on.

It is the shift of SD3 (arXiv 2403.03206, equation 23), whose time runs the other way, with 1 / s for its factor.
"""

import math

from torch import Tensor

from vavae.diffusion.config import Shift

_BASE_DIMENSION = 4096
"""Dimension of a latent for which the shift by dimension is 1."""


def shift_factor(shift: Shift, dimension: int) -> float:
    """Factor s for latents of `dimension` numbers.

    By dimension it keeps the signal at a time apart from its noise as well as in a latent of 4096 numbers.
    """
    return math.sqrt(_BASE_DIMENSION / dimension) if shift == "by_dimension" else float(shift)


def shift_times(t: Tensor, shift: Shift, dimension: int) -> Tensor:
    """Shift times in [0, 1], of any shape, for latents of `dimension` numbers; below 1 it moves them to the noise."""
    factor = shift_factor(shift, dimension)
    return factor * t / (1 + (factor - 1) * t)
