"""The decoder of a representation autoencoder: a transformer of the form of MAE's, as RAE (arXiv 2510.11690) uses it.

Shapes: B batch, C channels of the latent, h x w = N positions, D width, P pixels of a patch along one side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vavae.models.tokenizer.config import ViTDecoderConfig, ViTShape

_NORM_EPSILON = 1e-12
_INITIAL_STD = 0.02
_WAVELENGTH = 10_000


class ViTBlock(nn.Module):
    """Self-attention and a network of two layers, each after a norm and beside a residual path: [B, N, D] -> same."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norm1 = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.fc1 = nn.Linear(width, shape.mlp_width)
        self.fc2 = nn.Linear(shape.mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add both parts to the tokens."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, D / heads]
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViTDecoder(nn.Module):
    """Latents [B, C, h, w] -> images [B, image_channels, P·h, P·w], about [-1, 1] and not clamped.

    The adaptive weight of the adversarial loss is measured at ``output.weight``.

    Args:
        config: sizes of the transformer and of a patch.
        latent_dim: C.
        image_channels: channels of the images.
        recompute: keep only what enters a block for the backward pass.
    """

    def __init__(self, config: ViTDecoderConfig, latent_dim: int, image_channels: int, recompute: bool = False) -> None:
        super().__init__()
        self.config, self.image_channels, self.recompute = config, image_channels, recompute
        shape, patch = config.shape, config.patch_size
        self.embedder = nn.Linear(latent_dim, shape.width)
        self.class_token = nn.Parameter(torch.empty(1, 1, shape.width))
        self.blocks = nn.ModuleList(ViTBlock(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=_NORM_EPSILON)
        self.output = nn.Linear(shape.width, patch * patch * image_channels)
        nn.init.normal_(self.class_token, std=_INITIAL_STD)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=_INITIAL_STD)
                nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Decode latents, of any height and width."""
        grid, patch = (z.shape[2], z.shape[3]), self.config.patch_size
        tokens = self.embedder(z.flatten(2).transpose(1, 2))
        tokens = tokens + position_table(self.config.shape.width, grid).to(tokens)
        tokens = torch.cat([self.class_token.expand(len(z), -1, -1).to(tokens), tokens], dim=1)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens)
        patches = self.output(self.norm(tokens)[:, 1:]).unflatten(-1, (patch, patch, self.image_channels))
        patches = patches.unflatten(1, grid)  # [B, h, w, P, P, channels]
        images = patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        return 2 * images - 1 if self.config.unit_output else images


def position_table(width: int, grid: tuple[int, int]) -> Tensor:
    """Sinusoids of the positions of a grid (h, w), float32 [h·w, width]: half for the column, half for the row."""
    frequencies = _WAVELENGTH ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()
