"""A small LightningDiT that names and computes things as the public code does.

Written from the description of that code, with layers of torch.nn alone.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class RootMeanSquare(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weight


class PublicMlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(nn.GELU(approximate="tanh")(self.fc1(x)))


class PublicSwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * int(4 * width))
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class PublicRope(nn.Module):
    def __init__(self, head_dim, side):
        super().__init__()
        frequencies = 1 / 10_000 ** (torch.arange(0, head_dim // 2, 2)[: head_dim // 4].float() / (head_dim // 2))
        angles = torch.outer(torch.arange(side).float(), frequencies).repeat_interleave(2, 1)  # [side, head_dim / 2]
        grid = torch.cat([angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)], -1).flatten(0, 1)
        self.register_buffer("freqs_cos", grid.cos())
        self.register_buffer("freqs_sin", grid.sin())

    def forward(self, x):
        """x [B, heads, N, head_dim]."""
        odd = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * self.freqs_cos + odd * self.freqs_sin


class PublicAttention(nn.Module):
    def __init__(self, width, heads, use_qknorm, use_rmsnorm):
        super().__init__()
        self.heads, head_dim = heads, width // heads
        norm = RootMeanSquare if use_rmsnorm else nn.LayerNorm
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = norm(head_dim) if use_qknorm else nn.Identity()
        self.k_norm = norm(head_dim) if use_qknorm else nn.Identity()

    def forward(self, x, rope):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(width / self.heads)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class PublicBlock(nn.Module):
    def __init__(self, width, heads, use_qknorm, use_swiglu, use_rmsnorm, wo_shift):
        super().__init__()
        self.wo_shift = wo_shift
        self.norm1, self.norm2 = public_norm(width, use_rmsnorm), public_norm(width, use_rmsnorm)
        self.attn = PublicAttention(width, heads, use_qknorm, use_rmsnorm)
        self.mlp = PublicSwiGLU(width) if use_swiglu else PublicMlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (4 if wo_shift else 6) * width))

    def forward(self, x, c, rope):
        parts = self.adaLN_modulation(c)[:, None]
        if self.wo_shift:
            scale1, gate1, scale2, gate2 = parts.chunk(4, -1)
            shift1 = shift2 = 0
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = parts.chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rope)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PublicLightningDiT(nn.Module):
    """The published transformer with all its switches; weights are random, none of them zero."""

    def __init__(
        self, input_size=8, patch_size=1, in_channels=4, hidden_size=48, depth=2, num_heads=3, num_classes=5,
        class_dropout_prob=0.1, learn_sigma=False,
        use_qknorm=False, use_swiglu=False, use_rope=False, use_rmsnorm=False, wo_shift=False,
    ):  # fmt: skip
        super().__init__()
        self.patch, self.channels, side = patch_size, in_channels * (1 + learn_sigma), input_size // patch_size
        self.side = side
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(num_classes + (class_dropout_prob > 0), hidden_size)
        self.pos_embed = nn.Parameter(sincos(hidden_size, side)[None], requires_grad=False)
        self.feat_rope = PublicRope(hidden_size // num_heads, side) if use_rope else None
        self.blocks = nn.ModuleList(
            PublicBlock(hidden_size, num_heads, use_qknorm, use_swiglu, use_rmsnorm, wo_shift) for _ in range(depth)
        )
        self.final_layer = nn.Module()
        self.final_layer.norm_final = public_norm(hidden_size, use_rmsnorm)
        self.final_layer.linear = nn.Linear(hidden_size, patch_size**2 * self.channels)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            if name != "pos_embed":
                one = name.endswith("weight") and parameter.ndim == 1  # about which the weight of a norm lies
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator) + one

    def forward(self, x, t, y):
        tokens = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        angles = t[:, None] * 10_000 ** (-torch.arange(128) / 128)
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], -1)) + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            tokens = block(tokens, c, self.feat_rope)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        tokens = self.final_layer.linear(self.final_layer.norm_final(tokens) * (1 + scale) + shift)
        square = tokens.reshape(len(x), self.side, self.side, self.patch, self.patch, self.channels)
        return torch.einsum("bhwpqc->bchpwq", square).reshape(len(x), self.channels, *x.shape[2:])


def public_norm(width, use_rmsnorm):
    return RootMeanSquare(width) if use_rmsnorm else nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def sincos(width, side):
    """Fixed positions [N, D]: the column in the first half of the channels, the row in the second, each [sin | cos]."""
    frequencies = 1 / 10_000 ** (torch.arange(width // 4).double() / (width / 4))
    angles = torch.outer(torch.arange(side).double(), frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], -1)  # [side, D / 2]
    both = torch.cat([axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)], -1)
    return both.flatten(0, 1).float()
