"""A LightningDiT with random weights that takes no time, and something to give it."""

import torch
from torch import Tensor

from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT

SIZES = {"size": None, "depth": 2, "width": 32, "heads": 2, "classes": 5}
"""Fields of its configuration."""


def random_dit(latent_dim: int = 3, grid: int | tuple[int, int] = 4, seed: int = 0, **switches: object) -> LightningDiT:
    """A small model whose output is not the zero it starts with."""
    generator = torch.Generator().manual_seed(seed)
    model = LightningDiT(LightningDiTConfig.model_validate({**SIZES, **switches}), latent_dim, grid, generator)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def dit_inputs(batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, timesteps and labels for the default sizes."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, 3, 4, 4, generator=generator)
    return noise, torch.rand(batch, generator=generator), torch.arange(batch)
