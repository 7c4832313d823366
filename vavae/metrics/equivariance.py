"""Equivariance of a decoder: whether a change of latents is the same change of images (after EQ-VAE, 2502.09509).

Shapes: B images, c channels of an image, C of a latent, a grid of h x w positions.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SquaredErrors(NamedTuple):
    """Mean squared differences over the pixels and channels of each image, float [B]."""

    reconstruction: Tensor
    """Between decoded latents and images."""
    quarter_turn: Tensor
    """Between decodings of turned latents and turned decodings, a quarter clockwise."""
    half_size: Tensor
    """The same for half the height and width, resized bilinearly without antialiasing; odd sides of a grid are rounded
    up."""


class EquivarianceErrors(NamedTuple):
    """Differences of decoded changes from changed decodings, over the error of reconstructions.

    0 is an equivariant decoder; at 1 the change costs as much as encoding and decoding did.
    """

    quarter_turn: float
    half_size: float


def squared_errors(decode: Callable[[Tensor], Tensor], z: Tensor, images: Tensor, decoded: Tensor) -> SquaredErrors:
    """Decode changed latents, and compare: one and a quarter further passes of the decoder.

    Args:
        decode: decodes latents [B, C, h, w] of any grid to images.
        z: latents [B, C, h, w].
        images: those that were encoded, [B, c, H, W].
        decoded: the decoded latents, [B, c, H, W].
    """
    half = [(side + 1) // 2 for side in z.shape[2:]]
    pixels = [side * size // of_grid for side, size, of_grid in zip(half, images.shape[2:], z.shape[2:], strict=True)]
    turn = partial(torch.rot90, dims=(-1, -2))
    resize = partial(F.interpolate, mode="bilinear", align_corners=False)
    compared = [
        (decoded, images),
        (decode(turn(z)), turn(decoded)),
        (decode(resize(z, half)), resize(decoded, pixels)),
    ]
    return SquaredErrors(*((ours - theirs).square().flatten(1).mean(1) for ours, theirs in compared))


def equivariance_errors(errors: SquaredErrors) -> EquivarianceErrors:
    """Ratios of the mean errors; infinite where reconstructions are exact and changed ones are not."""
    reconstruction, *changed = (error.double().mean().item() for error in errors)
    return EquivarianceErrors(*(_ratio(error, reconstruction) for error in changed))


def _ratio(error: float, reconstruction: float) -> float:
    if error == 0:
        return 0.0
    return error / reconstruction if reconstruction else float("inf")
