"""Changes of the latents between encoder and decoder, with which the tokenizer is trained and never measured."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from vavae.losses.config import LatentNoiseConfig


class LatentNoise(NamedTuple):
    """Noise on the latents of a micro-batch."""

    config: LatentNoiseConfig
    level: Tensor
    """Level of each image, [S, 1, 1, 1] in [0, 1)."""
    noise: Tensor
    """Standard normal, [S, C, h, w]."""

    @classmethod
    def draw(cls, config: LatentNoiseConfig | None, shape: Sequence[int], rng: torch.Generator) -> Self | None:
        """Draw noise for latents of a shape [S, C, h, w] on the device of the rng; None where it is off."""
        if config is None or config.scale == 0:
            return None
        level = torch.rand((shape[0], 1, 1, 1), generator=rng, device=rng.device)
        return cls(config, level, torch.randn(shape, generator=rng, device=rng.device))

    def apply(self, z: Tensor) -> Tensor:
        """Latents [S, C, h, w] with the noise; gradients flow through."""
        kept = z if self.config.kind == "add" else (1 - self.level) * z
        return kept + self.level * self.config.scale * self.noise
