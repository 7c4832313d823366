"""The class token of REG (arXiv 2507.01467): a teacher's vector of the whole image, denoised beside the latent.

Both make one state: the token fills further channels of the latent, position by position, and zeros what is left of the
last. So whatever is done to a latent by itself, such as noising, guiding and solving, is done to both.
Shapes: B batch, C latent channels, H x W latent grid, F channels of the token, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vavae.models.dit.config import LightningDiTConfig


def state_channels(config: LightningDiTConfig, latent_dim: int, grid: tuple[int, int]) -> int:
    """Channels of the state of a model for latents of C channels on a grid; C where it has no class token."""
    width = 0 if config.class_token is None else config.class_token.width
    return latent_dim + -(-width // (grid[0] * grid[1]))


def join_class_token(latents: Tensor, token: Tensor) -> Tensor:
    """State [B, C + ⌈F / H W⌉, H, W] of latents [B, C, H, W] and class tokens [B, F]."""
    padded = F.pad(token.flatten(1), (0, -token[0].numel() % latents[0, 0].numel()))
    return torch.cat([latents, padded.unflatten(1, (-1, *latents.shape[2:])).to(latents.dtype)], dim=1)


def class_token_of(state: Tensor, latent_dim: int, width: int) -> Tensor:
    """Class tokens [B, F] of states of latents with C channels."""
    return state[:, latent_dim:].flatten(1)[:, :width]


class ClassTokenEmbedding(nn.Module):
    """Normalized linear map of class tokens, [B, F] -> [B, 1, D]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, width)
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, token: Tensor) -> Tensor:
        """Tokens of class tokens."""
        return self.norm(self.proj(token))[:, None]
