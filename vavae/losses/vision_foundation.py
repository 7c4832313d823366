"""The vision-foundation loss of VA-VAE, arXiv 2501.01423 section 4.

Shapes: B batch, C channels of the compared features, h, w latent grid, N = h·w positions.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vavae.losses.config import VisionFoundationLossConfig


class VisionFoundationTerms(NamedTuple):
    """Terms of the vision-foundation loss, scalars; only ``total`` is meant to be differentiated."""

    cosine: Tensor
    """Marginal cosine loss, equation 2, detached."""
    distance: Tensor
    """Marginal distance matrix loss, equation 3, detached."""
    total: Tensor
    """The weighted sum of the two, before the weight of equation 5."""
    alignment: Tensor
    """Mean cosine of projected latents and teacher features, in [-1, 1], detached: for reporting."""


def marginal_cosine(cosines: Tensor, margin: float) -> Tensor:
    """Marginal cosine loss, equation 2: the mean of ReLU(1 - m1 - cos(z'_ij, f_ij)) over images and positions: scalar.

    Args:
        cosines: cosines of latents and features at the same position, [B, h, w].
        margin: m1.
    """
    return F.relu(1.0 - margin - cosines).mean()


def marginal_distance_matrix(z: Tensor, features: Tensor, margin: float, tokens_at_once: int | None = None) -> Tensor:
    """Marginal distance matrix loss, equation 3, a scalar.

    It is the mean of ReLU(|cos(z_i, z_j) - cos(f_i, f_j)| - m2) over images and pairs i, j.
    All pairs of positions within an image count, the diagonal too (released code).

    Args:
        z: projected latents, [B, C, h, w].
        features: teacher features, [B, C', h, w].
        margin: m2.
        tokens_at_once: above this many positions the matrices are made in blocks of rows, none larger than the whole
            matrix of so many positions, and made again in the backward pass; none means never.
    """
    z, features = _directions(z), _directions(features)
    batch, _, tokens = z.shape
    if tokens_at_once is None or tokens <= tokens_at_once:
        excess = _row_excess(z, z, features, features, margin)
    else:
        rows = max(1, tokens_at_once**2 // tokens)
        blocks = zip(z.split(rows, dim=2), features.split(rows, dim=2), strict=True)
        excess = torch.stack([_recomputed(z_rows, z, f_rows, features, margin) for z_rows, f_rows in blocks]).sum()
    return excess / (batch * tokens**2)


def _directions(features: Tensor) -> Tensor:
    """Unit vectors: [B, C, h, w] -> [B, C, N]."""
    return F.normalize(features.flatten(2), dim=1)


def _row_excess(z_rows: Tensor, z: Tensor, f_rows: Tensor, f: Tensor, margin: float) -> Tensor:
    """Sum of the differences of rows of the two matrices beyond the margin: [B, C, R] and [B, C, N] -> scalar."""
    with torch.autocast(z.device.type, enabled=False):  # which would multiply in half precision
        differences = z_rows.transpose(1, 2) @ z - f_rows.transpose(1, 2) @ f  # [B, R, N]
    return F.relu(differences.abs() - margin).sum()


_recomputed = partial(checkpoint, _row_excess, use_reentrant=False, preserve_rng_state=False)


class VisionFoundationLoss(nn.Module):
    """The vision-foundation loss: both terms, after a learned linear map (equation 1, released code)."""

    def __init__(self, config: VisionFoundationLossConfig, latent_dim: int, feature_dim: int) -> None:
        super().__init__()
        self.config = config
        if config.projection == "latent_to_teacher":
            self.projection = nn.Conv2d(latent_dim, feature_dim, kernel_size=1, bias=False)
        else:
            self.projection = nn.Conv2d(feature_dim, latent_dim, kernel_size=1)

    def forward(self, z: Tensor, features: Tensor) -> VisionFoundationTerms:
        """Compare a posterior sample [B, latent_dim, h, w] with teacher features [B, feature_dim, h, w]."""
        assert z.shape[2:] == features.shape[2:], f"latents and features on one grid: {z.shape}, {features.shape}"
        dtype = self.projection.weight.dtype
        if self.config.projection == "latent_to_teacher":
            z = self.projection(z.to(dtype))
        else:
            features = self.projection(features.to(dtype))
        z, features = z.float(), features.float()
        cosines = F.cosine_similarity(z, features, dim=1)
        cosine = marginal_cosine(cosines, self.config.cos_margin)
        distance = marginal_distance_matrix(z, features, self.config.distmat_margin, self.config.distmat_tokens_at_once)
        total = self.config.cos_weight * cosine + self.config.distmat_weight * distance
        return VisionFoundationTerms(cosine.detach(), distance.detach(), total, cosines.mean().detach())
