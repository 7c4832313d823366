"""LightningDiT (arXiv 2501.01423, table 1): embeddings, block and model, with the released parameter names.

Time runs from noise (t = 0) to data (t = 1); the model predicts the velocity data - noise, or the data.
Shapes: B batch, C latent channels, H x W latent grid, h x w = N tokens, D width, P patch size.
"""

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vavae.errors import UserError
from vavae.models.dit.class_token import ClassTokenEmbedding, class_token_of, join_class_token, state_channels
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.in_context import ContextEmbedding, condition_of_tokens
from vavae.models.dit.parametrization import velocity_to_data
from vavae.models.dit.routing import TokenFusion, put_tokens, take_tokens

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


class Predictions(NamedTuple):
    """Velocities that one pass of the transformer predicts, both [B, C, H, W], and tokens of it."""

    velocity: Tensor
    intermediate: Tensor | None
    """Velocity of the head after an inner block; None where the model has none."""
    tokens: Tensor | None = None
    """Tokens [B, N, D] after the block that was asked for."""
    instantaneous: Tensor | None = None
    """Velocity at t itself beside the average one, where guidance is an input; else None."""


class LightningDiT(nn.Module):
    """The transformer velocity(x_t, t, y) for latents of one grid.

    Tokens between the blocks keep the dtype of the weights, under an autocast too, which is that of the tables of
    positions that they begin with. In bfloat16 they would take 20 of the 130 bytes and more that a compiled block moves
    per token and channel in a training step, but multiply the error: that of the velocity from 0.3 to 0.9 % of its norm
    at depth 12 and to 1.3 % at depth 28, that of the gradient from 0.3 to 0.8 and 1 %, as they round at every block.

    Args:
        config: sizes and switches.
        latent_dim: C.
        grid: H and W, or both as one number; the position tables are computed from it, see `at_grid`.
        rng: draws the initial weights; None takes torch's global one.

    Raises:
        UserError: the patches do not tile the grid.
    """

    pos_embed: Tensor | None

    def __init__(
        self,
        config: LightningDiTConfig,
        latent_dim: int,
        grid: int | tuple[int, int],
        rng: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        patch, shape = config.patch_size, config.shape
        self.config, self.latent_dim = config, latent_dim
        assert config.classes is not None, "the number of classes comes with the data: see with_classes"
        self.null_label = config.classes

        self.x_embedder = PatchEmbedding(latent_dim, shape.width, patch)
        self.t_embedder = TimestepEmbedding(shape.width)
        self.y_embedder = LabelEmbedding(self.null_label, shape.width)
        self.context_embedder = ContextEmbedding(config) if config.in_context else None
        class_width = None if config.class_token is None else config.class_token.width
        self.class_embedder = None if class_width is None else ClassTokenEmbedding(class_width, shape.width)
        self.head = None if config.head is None else WideHead(config, latent_dim)
        self._lay_out(grid)
        self.blocks = nn.ModuleList(Block(config) for _ in range(shape.depth))
        self.final_layer = FinalLayer(config.head_blocks, patch * patch * latent_dim, class_width)
        self.final_layer_xr: FinalLayer | None = None  # the name of the public code
        if config.intermediate_head is not None:
            self.final_layer_xr = FinalLayer(config, patch * patch * latent_dim)
            self.intermediate_after = config.intermediate_head.after_block
        self.fusion: TokenFusion | None = None
        if config.routing is not None and config.routing.fuse is not None:
            self.fusion = TokenFusion(shape.width)
        self.length_embedder = TimestepEmbedding(shape.width) if config.average_velocity else None
        self.guidance_embedder: GuidanceEmbedding | None = None
        self.final_layer_v: FinalLayer | None = None
        if config.guidance_inputs:
            self.guidance_embedder = GuidanceEmbedding(shape.width)
            self.final_layer_v = FinalLayer(config.head_blocks, patch * patch * latent_dim)
        initialize(self, rng)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of what is denoised: that of a latent, with further channels where there is a class token."""
        return state_channels(self.config, self.latent_dim, self.grid), *self.grid

    @property
    def all_blocks(self) -> list[nn.Module]:
        """The blocks, and those of the head."""
        return [*self.blocks, *([] if self.head is None else self.head.blocks)]

    def _lay_out(self, grid: int | tuple[int, int], span: tuple[int, int] | None = None) -> None:
        """Set the grid and compute its position tables, on the device and in the dtype of the weights."""
        patch, shape, weight = self.config.patch_size, self.config.shape, self.x_embedder.proj.weight
        height, width = (grid, grid) if isinstance(grid, int) else grid
        if height % patch or width % patch:
            raise UserError(f"patch_size={patch} does not divide the {height} x {width} latent: choose a divisor")
        self.grid, self.tokens = (height, width), (height // patch, width // patch)
        self.span = span or self.tokens
        table = None if self.config.in_context else sincos_position_embedding(shape.width, self.tokens, span).to(weight)
        self.register_buffer("pos_embed", table)
        self.feat_rope: RotaryEmbedding | None = None
        if self.config.rope:
            self.feat_rope = RotaryEmbedding(shape.head_dim, self.tokens, span).to(weight.device, weight.dtype)
        if self.head is not None:
            self.head.feat_rope = None
            if self.config.rope:
                head_dim = self.config.head_blocks.shape.head_dim
                self.head.feat_rope = RotaryEmbedding(head_dim, self.tokens, span).to(weight.device, weight.dtype)

    def at_grid(self, grid: int | tuple[int, int], *, rescale: bool = False) -> "LightningDiT":
        """A copy with the same weights for latents of another grid, H and W or both as one number.

        Only the tables of positions are computed again. By default they are extended: neighboring tokens stay one
        apart, as in a model that is built for the new grid (released code). With `rescale` the positions stay within
        the range that this model knows, with fractions between them (EVA-02), so that a token keeps its place in
        the picture. Both tables are part of the state dict, so a checkpoint remembers which it was.

        Raises:
            UserError: the patches do not tile the grid.
        """
        model = copy.deepcopy(self)
        model._lay_out(grid, self.span if rescale else None)
        return model

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity [B, C, H, W], in the dtype of x.

        Args:
            x: noisy normalized latents [B, C, H, W], joined with noisy class tokens where there are any.
            t: timesteps [B] in [0, 1], below 1 for a model that predicts the data.
            y: labels int64 [B] in [0, classes]; `null_label` = classes asks for the unconditional velocity.
        """
        return self.predict(x, t, y).velocity

    def predict(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        keep: Tensor | None = None,
        path_dropped: Tensor | None = None,
        data_floor: float = 0.0,
        tokens_after: int | None = None,
        end: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Predictions:
        """Velocities of all output layers, for the arguments of `forward`.

        A model that predicts the data gives them by :func:`velocity_to_data`.

        Args:
            x, t, y: as there.
            keep: indices int64 [B, K] of the tokens that do not skip the blocks of `config.routing`; None: all. With a
                fusion there may be none.
            path_dropped: mask bool [B] of images as if there were none, with a fusion; None: no image.
            data_floor: floor of :func:`velocity_to_data`.
            tokens_after: number of blocks after which tokens are returned, too; None returns none.
            end: times [B], none before t, up to which velocities are averaged, with `config.average_velocity`; None: t.
            guidance: scale and both ends of the interval of the guidance within the velocities, float32 [B, 3], with
                `config.guidance_inputs`; None: a scale of 1 at all times.
        """
        assert x.shape[1:] == self.state_shape, f"expected [B, {self.state_shape}]: {x.shape}"
        state, time, label = x.to(self.x_embedder.proj.weight.dtype), self.t_embedder(t), self.y_embedder(y)
        latents = state[:, : self.latent_dim]
        if self.length_embedder is not None:
            time = time + self.length_embedder(torch.zeros_like(t) if end is None else end - t)
        assert end is None or self.length_embedder is not None, "a model of velocities"
        if self.guidance_embedder is not None:
            time = time + self.guidance_embedder(t.new_tensor([[1, 0, 1]]) if guidance is None else guidance)
        assert guidance is None or self.guidance_embedder is not None, "a model without guidance as an input"
        tokens = self.x_embedder(latents)  # [B, N, D]
        tokens = tokens.to(latents.dtype) if self.pos_embed is None else tokens + self.pos_embed
        activated = F.silu(time + label)  # [B, D], what every modulation starts with
        if self.head is not None:
            activated = F.silu(activated)  # twice, as in the public code with a head
        rotation = None if self.feat_rope is None else self.feat_rope()
        count, context = tokens.shape[1], self.context_embedder
        of_blocks = activated if context is None else None
        if self.class_embedder is not None:
            token = class_token_of(state, self.latent_dim, self.class_embedder.proj.in_features)
            tokens = torch.cat([tokens, self.class_embedder(token).to(tokens.dtype)], dim=1)
        if context is not None:
            tokens = context(tokens, time, label)
        further = tokens.shape[1] - count
        if further and rotation is not None:
            rotation = rotation.extended(further)
        if further and keep is not None:
            others = torch.arange(count, tokens.shape[1], device=keep.device)  # they skip no block
            keep = torch.cat([keep, others.expand(len(keep), -1)], dim=1)
        inner_outputs = inner_tokens = class_outputs = None
        routing, rotation_of_all = self.config.routing, rotation
        first, last = (None, None) if routing is None else (routing.first_block, routing.last_block)
        assert keep is None or routing is not None, "a model whose tokens all take all blocks"
        for finished, block in enumerate(self.blocks, 1):
            if finished - 1 == first:
                before = tokens
                if keep is not None:
                    tokens = take_tokens(tokens, keep)
                    rotation = None if rotation is None else Rotation(*(table[keep] for table in rotation))
            if tokens.shape[1]:
                tokens = run_block(block, tokens, of_blocks, rotation, self.config.checkpoint_activations)
            if finished - 1 == last:
                rotation = rotation_of_all
                if self.fusion is not None:
                    tokens = self.fusion(before, tokens, keep, path_dropped)
                elif keep is not None:
                    tokens = put_tokens(before, keep, tokens)
            if self.final_layer_xr is not None and finished == self.intermediate_after:
                inputs = tokens[:, :count], activated
                if context is not None:
                    condition = condition_of_tokens(tokens[:, :count], time)
                    inputs = condition, F.silu(condition)
                inner_outputs = self.final_layer_xr(*inputs)
            if finished == tokens_after:
                inner_tokens = tokens[:, :count]
                if self.class_embedder is not None:
                    inner_tokens = torch.cat([tokens[:, count : count + 1], inner_tokens], dim=1)
        if self.class_embedder is not None:
            class_outputs = self.final_layer(tokens[:, count : count + 1], activated, of_class_token=True)[:, 0]
        tokens = tokens[:, :count]
        if self.head is not None:
            tokens, activated = self.head(latents, tokens, time)

        def velocity(outputs: Tensor) -> Tensor:
            return self._velocity(outputs, class_outputs, x, t, data_floor)

        intermediate = None if inner_outputs is None else velocity(inner_outputs)
        instantaneous = None if self.final_layer_v is None else velocity(self.final_layer_v(tokens, activated))
        average = velocity(self.final_layer(tokens, activated))
        return Predictions(average, intermediate, inner_tokens, instantaneous)

    def _velocity(
        self, outputs: Tensor, class_outputs: Tensor | None, x: Tensor, t: Tensor, data_floor: float
    ) -> Tensor:
        """Velocity of the state x, in its dtype, from the outputs [B, N, P · P · C] of an output layer, and [B, F]."""
        output = self._unpatchify(outputs)
        if class_outputs is not None:
            output = join_class_token(output, class_outputs)
        if self.config.predicts_data:
            output = velocity_to_data(output, x, t, data_floor)
        return output.to(x.dtype)

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """Join tokens [B, N, P · P · C] to latents [B, C, H, W]; within a token the channel varies fastest."""
        patch = self.config.patch_size
        x = tokens.unflatten(1, self.tokens).unflatten(-1, (patch, patch, self.latent_dim))  # [B, h, w, P, P, C]
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.latent_dim, *self.grid)


_OUTPUTS = (
    "final_layer.linear.weight",
    "final_layer.linear_cls.weight",
    "final_layer_v.linear.weight",
    "final_layer_xr.linear.weight",
    "length_embedder.mlp.2.weight",
    *(f"guidance_embedder.{name}.mlp.2.weight" for name in ("scale", "low", "high")),
)


@torch.no_grad()
def initialize(model: LightningDiT, rng: torch.Generator | None = None) -> None:
    """Set all parameters as published: Xavier, but zero for the modulations and the output (adaLN-zero).

    Lengths of intervals and guidance count for nothing at first, so that trained weights of velocities remain what they
    are.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "adaLN_modulation" in name or name in _OUTPUTS:
            nn.init.zeros_(parameter)
        elif name.startswith(("t_embedder", "y_embedder", "length_embedder", "guidance_embedder")):
            nn.init.normal_(parameter, std=0.02, generator=rng)
        elif name.startswith("context_embedder"):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=rng)
        elif parameter.ndim == 1:
            nn.init.ones_(parameter)  # the weight of a norm
        else:
            nn.init.xavier_uniform_(parameter.flatten(1), generator=rng)  # a convolution as the linear map it is
    if model.fusion is not None:
        nn.init.normal_(model.fusion.mask_token, std=0.02, generator=rng)
