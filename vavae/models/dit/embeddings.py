"""Embeddings of the transformer's inputs: patches, positions, time and label.

Shapes: B batch, C latent channels, H x W latent grid, h x w = N tokens, D width, P patch size.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

MAX_PERIOD = 10_000.0
"""Longest wavelength, over 2π, of every sinusoid in the model."""


class PatchEmbedding(nn.Module):
    """Linear map of non-overlapping P x P patches, [B, C, H, W] -> [B, N, D], tokens row by row."""

    def __init__(self, latent_dim: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(latent_dim, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of latents [B, C, H, W]."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedding(nn.Module):
    """Sinusoids of t and a two-layer perceptron, [B] -> [B, D]; t in [0, 1] is not scaled up (released code)."""

    def __init__(self, width: int, frequencies: int = 128) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embeddings of timesteps [B] in [0, 1]; the sinusoids are float32 whatever the weights are."""
        exponent = torch.arange(self.frequencies, dtype=torch.float32, device=t.device) / self.frequencies
        angle = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponent)  # [B, frequencies]
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class LabelEmbedding(nn.Module):
    """A vector per class and, last, one for the null label, [B] -> [B, D]."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        """Embeddings of int64 labels [B] in [0, classes]."""
        return self.embedding_table(y)


def sincos_position_embedding(width: int, grid: tuple[int, int], span: tuple[int, int] | None = None) -> Tensor:
    """The fixed embedding of a token grid (h, w), float32 [1, N, D]; for `span` see :func:`token_positions`.

    The first half of the channels encodes the column, the second the row, each as [sin | cos] (released code).
    """
    row, column = token_positions(grid, span)
    exponent = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    angle = torch.stack([column, row], dim=1)[:, :, None] * MAX_PERIOD**-exponent  # [N, 2, D/4]
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)[None].float()


def token_positions(grid: tuple[int, int], span: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Row and column of each token of a grid (h, w), both float64 [N], in the order of :class:`PatchEmbedding`.

    Neighbors are one apart; with a span (h', w') they are h' / h and w' / w apart, so that the grid reaches as far as
    one of h' x w' tokens.
    """
    ends = zip(grid, span or grid, strict=True)
    sides = [torch.arange(count, dtype=torch.float64) * (reach / count) for count, reach in ends]
    row, column = torch.meshgrid(*sides, indexing="ij")
    return row.flatten(), column.flatten()


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each token and channel, both [N, 1, head_dim]."""

    cos: Tensor
    sin: Tensor


class RotaryEmbedding(nn.Module):
    """Rotary position embedding on a grid (EVA-02 form), as tables under the released buffer names.

    Consecutive pairs of channels are rotated, in the first half of the head by row and in the second by column.
    For `span` see :func:`token_positions`.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_dim: int, grid: tuple[int, int], span: tuple[int, int] | None = None) -> None:
        super().__init__()
        # In float32 from here on, and in this order of operations, the tables are bitwise those of the release.
        exponent = torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 4)
        frequency = 1 / MAX_PERIOD**exponent
        angle = torch.stack(token_positions(grid, span), dim=1).float()[:, :, None] * frequency  # [N, 2, head_dim / 4]
        angle = angle.flatten(1).repeat_interleave(2, dim=1)  # [N, head_dim]
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())

    def forward(self) -> Rotation:
        """The tables in the shape that :func:`rotate` takes, the same for every head."""
        return Rotation(self.freqs_cos[:, None], self.freqs_sin[:, None])


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each channel pair (x0, x1) of x [B, N, heads, head_dim] by the angle of its token and frequency."""
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-x1, x0], dim=-1).flatten(-2)  # by a right angle
    return torch.addcmul(x * rotation.cos, turned, rotation.sin).type_as(x)
