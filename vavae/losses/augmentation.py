"""Differentiable augmentation of what a discriminator sees: DiffAug, arXiv 2006.10738, in the form of RAE."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from vavae.losses.config import AugmentConfig

_SHIFT = 0.125
"""Largest translation, as a share of a side."""


class Augmentation(NamedTuple):
    """Drawn augmentation of a micro-batch."""

    translates: bool
    recolors: bool
    cuts: bool
    uniform: Tensor
    """Uniform draws [7, S, 1, 1]: translation down and right, brightness, saturation, contrast, place of the cut."""
    cutout: float = 0.0
    """Side of the cut, as a share of an image's."""

    @classmethod
    def draw(cls, config: AugmentConfig | None, count: int, rng: torch.Generator) -> Self | None:
        """Draw for so many images, on the device of the rng; None where there is no augmentation."""
        if config is None:
            return None
        translates, recolors, cuts = (torch.rand(3, generator=rng, device=rng.device) < config.probability).tolist()
        uniform = torch.rand(7, count, 1, 1, generator=rng, device=rng.device)
        return cls(translates, recolors, cuts and config.cutout > 0, uniform, config.cutout)

    def apply(self, images: Tensor) -> Tensor:
        """Augment images [S, C, H, W] in [-1, 1], computed in float32; gradients flow through."""
        images, uniform = images.float(), self.uniform.to(images.device, non_blocking=True)
        if self.translates:
            images = _translate(images, uniform[0], uniform[1])
        if self.recolors:
            images = _recolor(images, *uniform[2:5, :, None])
        return _cut(images, self.cutout, uniform[5], uniform[6]) if self.cuts else images


def _translate(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Translate by up to an eighth of each side, with zeros, which is gray, where nothing is left."""
    places = []
    for side, uniform in zip(images.shape[2:], (down, right), strict=True):
        most = round(side * _SHIFT)
        offset = (uniform * (2 * most + 1)).floor().long() - most  # [S, 1, 1]
        place = torch.arange(side, device=images.device) + offset.flatten(1)  # [S, side]
        places.append((place + 1).clamp(0, side + 1))
    rows, columns = places
    index = torch.arange(len(images), device=images.device)[:, None, None]
    padded = F.pad(images, (1, 1, 1, 1)).movedim(1, -1)
    return padded[index, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _recolor(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Change brightness by up to a half, saturation by a factor up to 2, contrast by one of 0.5 to 1.5."""
    images = images + (brightness - 0.5)
    gray = images.mean(dim=1, keepdim=True)
    images = (images - gray) * (2 * saturation) + gray
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def _cut(images: Tensor, share: float, down: Tensor, right: Tensor) -> Tensor:
    """Set a rectangle to zero, which is gray; its center lies anywhere."""
    inside = []
    lengths = [round(side * share) for side in images.shape[2:]]
    if not all(lengths):
        return images
    for side, length, uniform in zip(images.shape[2:], lengths, (down, right), strict=True):
        start = (uniform * (side + 1 - length % 2)).floor().long().flatten(1) - length // 2  # [S, 1]
        place = torch.arange(side, device=images.device)
        inside.append((place >= start.clamp(0, side - 1)) & (place <= (start + length - 1).clamp(0, side - 1)))
    rows, columns = inside
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])
