"""Alignment of the transformer's tokens with features of a frozen network: REPA and iREPA.

Shapes: B batch, h x w = N tokens, D width of the transformer, F channels of the features.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vavae.diffusion.config import RepresentationConfig

_EPS = 1e-6
"""Added to the deviation of features (released code)."""


def normalize_spatially(features: Tensor, share: float) -> Tensor:
    """Map features [B, N, F] to (f - share · mean) / (deviation + eps), both over the positions of an image (iREPA)."""
    mean, std = features.mean(1, keepdim=True), features.std(1, keepdim=True)
    return (features - share * mean) / (std + _EPS)


class RepresentationAlignment(nn.Module):
    """Projection of an inner block's tokens, and its distance from features: minus their mean cosine.

    REPA, arXiv 2410.06940, with `mlp`; iREPA, arXiv 2512.10794, with `conv` and features normalized over positions.

    Args:
        config: projector and normalization.
        width: D.
        feature_dim: F.
        grid: h and w.
    """

    def __init__(self, config: RepresentationConfig, width: int, feature_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.after_block, self._spatial_norm, self._grid = config.after_block, config.spatial_norm, grid
        self.projector: nn.Module
        if config.projector == "conv":
            self.projector = nn.Conv2d(width, feature_dim, 3, padding=1)
            return
        hidden = config.projector_width
        layers = [nn.Linear(*sizes) for sizes in ((width, hidden), (hidden, hidden), (hidden, feature_dim))]
        for layer in layers:  # as the released code initializes all linear layers of its transformer
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.projector = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])

    def project(self, tokens: Tensor) -> Tensor:
        """Project tokens [B, N, D] to the space of the features, [B, N, F]."""
        if not isinstance(self.projector, nn.Conv2d):
            return self.projector(tokens)
        picture = tokens.transpose(1, 2).unflatten(2, self._grid)  # [B, D, h, w]
        return self.projector(picture).flatten(2).transpose(1, 2)

    def target(self, features: Tensor) -> Tensor:
        """Return what tokens are compared with, [B, N, F], in float32 or float64."""
        features = _at_least_float32(features)
        return features if self._spatial_norm is None else normalize_spatially(features, self._spatial_norm)

    def forward(self, tokens: Tensor, features: Tensor | None) -> Tensor:
        """Compare tokens [B, N, D] with features [B, N, F] of the same images, of any float dtype.

        Returns:
            Minus their mean cosine, a scalar in [-1, 1]. Without features it is a zero that gives all parameters a
            gradient of zero, because engines that partition them expect one in every step.
        """
        if features is None:
            return 0 * self.project(tokens[:1].detach()).float().sum()
        assert tokens.shape[:2] == features.shape[:2], f"a feature for each token: {tokens.shape}, {features.shape}"
        projected, target = _at_least_float32(self.project(tokens)), self.target(features)
        return -(F.normalize(projected, dim=-1) * F.normalize(target, dim=-1)).sum(-1).mean()


def _at_least_float32(values: Tensor) -> Tensor:
    # In half precision a cosine of long vectors overflows.
    return values.to(torch.promote_types(values.dtype, torch.float32))
