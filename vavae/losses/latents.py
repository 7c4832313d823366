"""Changes of latents and images with which the tokenizer is trained, and never measured: noise, sizes, orientations."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from vavae.losses.config import EquivarianceConfig, LatentNoiseConfig


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


class Transform(NamedTuple):
    """Change of size and orientation, which latents and images can undergo alike."""

    grid: tuple[int, int]
    """Height and width of a latent that is resized, before it is turned."""
    quarter_turns: int = 0
    """Clockwise."""

    @property
    def turned_grid(self) -> tuple[int, int]:
        """Height and width of a latent afterwards."""
        height, width = self.grid
        return (width, height) if self.quarter_turns % 2 else (height, width)

    def apply(self, x: Tensor, cell: int = 1) -> Tensor:
        """Resize bilinearly, without antialiasing, and turn; gradients flow through.

        Args:
            x: latents [S, C, h, w], or images [S, C, cell h, cell w].
            cell: pixels of a latent position along one side; 1 for latents.
        """
        size = [side * cell for side in self.grid]
        resized = F.interpolate(x, size, mode="bilinear", align_corners=False)
        return torch.rot90(resized, self.quarter_turns, dims=(-1, -2))


class MicroBatchTransforms(NamedTuple):
    """Transforms of a micro-batch, at most one of both."""

    images: Transform | None = None
    """Before the encoder."""
    latents: Transform | None = None
    """Between encoder and decoder, and of the images that the reconstructions are compared with."""

    @classmethod
    def draw(cls, config: EquivarianceConfig | None, grid: tuple[int, int], rng: torch.Generator) -> Self:
        """Draw transforms for latents of height and width `grid`; both None where there are none."""
        if config is None:
            return cls()
        of_latents, of_images, size, turns = torch.rand(4, generator=rng, device=rng.device).tolist()
        grids = config.grids(grid)
        chosen = grids[int(size * len(grids))]
        if of_latents < config.probability:
            return cls(latents=Transform(chosen, 1 + int(3 * turns) if config.turns else 0))
        return cls(images=Transform(chosen)) if of_images < config.small_images else cls()


UNTRANSFORMED = MicroBatchTransforms()
"""No transform of either."""
