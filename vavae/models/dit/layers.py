"""Layers of LightningDiT (arXiv 2501.01423, table 1), with the released parameter names.

Shapes: B batch, C latent channels, H x W latent grid, h x w = N tokens, D width, P patch size.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.in_context import condition_of_tokens

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


class GuidanceEmbedding(nn.Module):
    """Embeddings of the scale of a guidance and of both ends of its interval, summed, [B, 3] -> [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.low, self.high = (TimestepEmbedding(width) for _ in range(3))

    def forward(self, guidance: Tensor) -> Tensor:
        """Embeddings of scales w >= 1, as 1 - 1 / w, and of intervals low <= t <= high."""
        scale, low, high = guidance.unbind(1)
        return self.scale(1 - 1 / scale) + self.low(low) + self.high(high)


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
    """Cosine and sine of the angle of each token and channel, both [N, 1, head_dim], or [B, K, 1, head_dim]."""

    cos: Tensor
    sin: Tensor
    """Negated at the first channel of each pair."""

    def extended(self, count: int) -> "Rotation":
        """The same, and that of so many further tokens, which have no position: they are not rotated."""
        padding = (0, 0, 0, 0, 0, count)
        return Rotation(F.pad(self.cos, padding, value=1.0), F.pad(self.sin, padding))


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
        first, second = self.freqs_sin.unflatten(-1, (-1, 2)).unbind(-1)
        sin = torch.stack([-first, second], dim=-1).flatten(-2)
        return Rotation(self.freqs_cos[:, None], sin[:, None])


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each channel pair (x0, x1) of x [B, N, heads, head_dim] by the angle of its token and frequency.

    Pairs are swapped by a flip, which a compiler reads in place; stacked from halves they would be written to memory.
    """
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * rotation.cos, swapped, rotation.sin).type_as(x)


EPS = 1e-6
"""Epsilon of every normalization over the width (released code)."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; the mean is taken in float32 for any dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., D]; same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight.type_as(x), EPS)


def token_norm(config: LightningDiTConfig) -> nn.Module:
    """The normalization of tokens, before attention, feed-forward and output."""
    width = config.shape.width
    return RMSNorm(width) if config.norm == "rmsnorm" else nn.LayerNorm(width, EPS, elementwise_affine=False)


def head_norm(config: LightningDiTConfig) -> nn.Module:
    """The normalization of queries and keys, per head."""
    if not config.qk_norm:
        return nn.Identity()
    return (RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm)(config.shape.head_dim)


_SHORT_SEQUENCE = 256
"""Most tokens among which torch's attention in bfloat16 on CPUs takes longer backwards than in float32: 4 to 7 times as
long among 16 to 64 of them, 1 to 2 times among 256, 0.9 times among 512 (torch 2.13, heads of 32 and 64)."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of queries to keys and values, all [B, heads, N, head_dim]; dtype of the values.

    In bfloat16 on CPUs it is computed in float32 where the sequence is short, because that is faster.
    """
    if v.device.type != "cpu" or v.dtype != torch.bfloat16 or v.shape[-2] > _SHORT_SEQUENCE:
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).type_as(v)


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys are normalized, then rotated."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        _, width, self.heads = config.shape
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = head_norm(config)
        self.k_norm = head_norm(config)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        """Attend among tokens x [B, N, D]; rotation None leaves queries and keys as they are."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each [B, N, heads, head_dim]
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        x = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w3(silu(a) · b) with (a, b) = w12(x). The hidden width is two thirds of four times D, rounded down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * width // 3
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens x [B, N, D]."""
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class GELUPerceptron(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh approximation, hidden width 4 D: the feed-forward layer of DiT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens x [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Modulation(nn.Sequential):
    """The linear map from silu(condition) to `chunks` vectors of the token width (adaLN-zero).

    The SiLU depends on the condition alone, so the model applies it once for all blocks. Index 0 holds its
    place: the released names count it.
    """

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__(nn.Identity(), nn.Linear(width, chunks * width))
        self.chunks = chunks

    def forward(self, activated: Tensor) -> tuple[Tensor, ...]:
        """Map silu(condition) [B, D] to `chunks` tensors [B, 1, D], or that of each token [B, N, D] to [B, N, D]."""
        mapped = super().forward(activated)
        return (mapped[:, None] if mapped.ndim == 2 else mapped).chunk(self.chunks, dim=-1)


def modulate(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """x · (1 + scale) + shift, for tokens x [B, N, D] and scale, shift [B, 1, D] or [B, N, D]."""
    return x * (1 + scale) if shift is None else torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """x + gate · attention(modulated norm(x)), then the same with the feed-forward layer.

    With in-context conditioning it is x + attention(norm(x)), and so on.
    """

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        width = config.shape.width
        self.shift = config.shift
        self.norm1 = token_norm(config)
        self.attn = Attention(config)
        self.norm2 = token_norm(config)
        self.mlp = SwiGLU(width) if config.mlp == "swiglu" else GELUPerceptron(width)
        self.adaLN_modulation = None if config.in_context else Modulation(width, 6 if config.shift else 4)

    def forward(self, x: Tensor, activated: Tensor | None, rotation: Rotation | None) -> Tensor:
        """Transform tokens x [B, N, D] under silu(condition) [B, D] or [B, N, D], None where it is in context."""
        if self.adaLN_modulation is None:
            x = x + self.attn(self.norm1(x), rotation)
            return x + self.mlp(self.norm2(x))
        modulation = self.adaLN_modulation(activated)
        shift1 = shift2 = None
        if self.shift:
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        else:
            scale1, gate1, scale2, gate2 = modulation
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), scale1, shift1), rotation))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), scale2, shift2)))


class FinalLayer(nn.Module):
    """Modulated norm and the linear map to the P · P · C values of each token; another to those of a class token."""

    def __init__(self, config: LightningDiTConfig, outputs: int, class_width: int | None = None) -> None:
        super().__init__()
        width = config.shape.width
        self.norm_final = token_norm(config)
        self.linear = nn.Linear(width, outputs)
        self.linear_cls = None if class_width is None else nn.Linear(width, class_width)  # the name of the public code
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, activated: Tensor, of_class_token: bool = False) -> Tensor:
        """Map tokens x [B, N, D] under silu(condition) [B, D] or [B, N, D] to [B, N, outputs], or to [B, N, F]."""
        linear = self.linear_cls if of_class_token else self.linear
        assert linear is not None, "a model with a class token"
        shift, scale = self.adaLN_modulation(activated)
        return linear(modulate(self.norm_final(x), scale, shift))


def run_block(
    block: nn.Module, tokens: Tensor, activated: Tensor | None, rotation: Rotation | None, again: bool
) -> Tensor:
    """Call a block; `again` computes it once more in the backward pass instead of keeping what it needs."""
    if again and torch.is_grad_enabled():
        return checkpoint(block, tokens, activated, rotation, use_reentrant=False)
    return block(tokens, activated, rotation)


class WideHead(nn.Module):
    """Blocks on tokens of their own, each under a condition of its own: what the blocks before made of it and the time.

    Beside the rotation it knows no positions.
    """

    feat_rope: RotaryEmbedding | None

    def __init__(self, config: LightningDiTConfig, latent_dim: int) -> None:
        super().__init__()
        inner, blocks = config.shape.width, config.head_blocks
        depth, width, _ = blocks.shape
        self.recompute = config.checkpoint_activations
        self.x_embedder = PatchEmbedding(latent_dim, width, config.patch_size)
        self.projector = nn.Identity() if inner == width else nn.Linear(inner, width)
        self.blocks = nn.ModuleList(Block(blocks) for _ in range(depth))

    def forward(self, x: Tensor, tokens: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Transform latents under the tokens of the blocks before.

        Args:
            x: noisy latents [B, C, H, W] in the dtype of the weights.
            tokens: after the last block before the head, [B, N, D].
            time: embedding of the timesteps [B, D].

        Returns:
            Tokens of the head and silu(condition) of each, both [B, N, width of the head].
        """
        activated = F.silu(self.projector(condition_of_tokens(tokens, time)))
        rotation = None if self.feat_rope is None else self.feat_rope()
        tokens = self.x_embedder(x).to(x.dtype)
        for block in self.blocks:
            tokens = run_block(block, tokens, activated, rotation, self.recompute)
        return tokens, activated
