"""The vision-foundation loss of VA-VAE, arXiv 2501.01423 section 4.

Shapes: B batch, C channels of the compared features, h, w latent grid, N = h·w positions.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from vavae.losses.config import VisionFoundationLossConfig


class VisionFoundationTerms(NamedTuple):
    """Scalars; only ``total`` is meant to be differentiated."""

    cosine: Tensor
    """Marginal cosine loss, equation 2, detached."""
    distance: Tensor
    """Marginal distance matrix loss, equation 3, detached."""
    total: Tensor
    """The weighted sum of the two, before the weight of equation 5."""
    alignment: Tensor
    """Mean cosine of projected latents and teacher features, in [-1, 1], detached: for reporting."""


def marginal_cosine(cosines: Tensor, margin: float) -> Tensor:
    """Equation 2: the mean of ReLU(1 - m1 - cos(z'_ij, f_ij)) over images and positions: scalar.

    Args:
        cosines: of latents and features at the same position, [B, h, w].
        margin: m1.
    """
    return F.relu(1.0 - margin - cosines).mean()


def marginal_distance_matrix(z: Tensor, features: Tensor, margin: float) -> Tensor:
    """Equation 3: the mean of ReLU(|cos(z_i, z_j) - cos(f_i, f_j)| - m2) over images and pairs i, j: scalar.

    All pairs of positions within an image count, the diagonal too (released code).

    Args:
        z: projected latents, [B, C, h, w].
        features: teacher features, [B, C', h, w].
        margin: m2.
    """
    return F.relu((self_similarity(z) - self_similarity(features)).abs() - margin).mean()


def self_similarity(features: Tensor) -> Tensor:
    """Cosines of all pairs of positions within each image: [B, C, h, w] -> [B, N, N]."""
    directions = F.normalize(features.flatten(2), dim=1)  # [B, C, N]
    return directions.transpose(1, 2) @ directions


class VisionFoundationLoss(nn.Module):
    """Both terms, on latents and features brought together by a learned linear map, equation 1 (released code)."""

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
        distance = marginal_distance_matrix(z, features, self.config.distmat_margin)
        total = self.config.cos_weight * cosine + self.config.distmat_weight * distance
        return VisionFoundationTerms(cosine.detach(), distance.detach(), total, cosines.mean().detach())
