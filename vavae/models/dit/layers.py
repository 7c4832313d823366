"""The layers of one transformer block. Shapes: B batch, N tokens, D width."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.embeddings import Rotation, rotate

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
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
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
        """Map silu(condition) [B, D] to `chunks` tensors [B, 1, D]."""
        return super().forward(activated)[:, None].chunk(self.chunks, dim=-1)


def modulate(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """x · (1 + scale) + shift, for tokens x [B, N, D] and scale, shift [B, 1, D]."""
    return x * (1 + scale) if shift is None else torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """x + gate · attention(modulated norm(x)), then the same with the feed-forward layer."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        width = config.shape.width
        self.shift = config.shift
        self.norm1 = token_norm(config)
        self.attn = Attention(config)
        self.norm2 = token_norm(config)
        self.mlp = SwiGLU(width) if config.mlp == "swiglu" else GELUPerceptron(width)
        self.adaLN_modulation = Modulation(width, 6 if config.shift else 4)

    def forward(self, x: Tensor, activated: Tensor, rotation: Rotation | None) -> Tensor:
        """Transform tokens x [B, N, D] under silu(condition) [B, D]; same shape."""
        modulation = self.adaLN_modulation(activated)
        shift1 = shift2 = None
        if self.shift:
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        else:
            scale1, gate1, scale2, gate2 = modulation
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), scale1, shift1), rotation))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), scale2, shift2)))


class FinalLayer(nn.Module):
    """Modulated norm and the linear map to the P · P · C values of each token."""

    def __init__(self, config: LightningDiTConfig, outputs: int) -> None:
        super().__init__()
        width = config.shape.width
        self.norm_final = token_norm(config)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        """Map tokens x [B, N, D] under silu(condition) [B, D] to [B, N, outputs]."""
        shift, scale = self.adaLN_modulation(activated)
        return self.linear(modulate(self.norm_final(x), scale, shift))
