"""Normalization of images in [-1, 1] to the statistics that a backbone was trained with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ImageNormalizer(nn.Module):
    """Map images [B, 3, H, W] from [-1, 1] to a backbone's zero mean and unit deviation.

    Args:
        mean: mean of each channel of images in [0, 1].
        std: standard deviation of each channel, likewise.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # ((x + 1) / 2 - mean) / std, as one multiplication and one addition
        deviation = torch.tensor(std).view(-1, 1, 1)
        self.register_buffer("scale", 0.5 / deviation, persistent=False)
        self.register_buffer("shift", (0.5 - torch.tensor(mean).view(-1, 1, 1)) / deviation, persistent=False)

    @classmethod
    def of(cls, model: Any) -> "ImageNormalizer":
        """The normalizer of a timm model, from the statistics in its ``pretrained_cfg``."""
        return cls(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])

    def forward(self, images: Tensor) -> Tensor:
        """Normalize images [B, 3, H, W] in [-1, 1]; same shape, gradients flow through."""
        return images * self.scale + self.shift
