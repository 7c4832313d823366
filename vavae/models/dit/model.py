"""LightningDiT (arXiv 2501.01423, table 1), with the released parameter names.

Time runs from noise (t = 0) to data (t = 1); the model predicts the velocity data - noise, or the data.
Shapes: B batch, C latent channels, H x W latent grid, h x w = N tokens, D width, P patch size.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vavae.errors import UserError
from vavae.models.dit.class_token import ClassTokenEmbedding, class_token_of, join_class_token, state_channels
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.in_context import ContextEmbedding, condition_of_tokens
from vavae.models.dit.layers import (
    Block,
    FinalLayer,
    GuidanceEmbedding,
    LabelEmbedding,
    PatchEmbedding,
    RotaryEmbedding,
    Rotation,
    TimestepEmbedding,
    WideHead,
    run_block,
    sincos_position_embedding,
)
from vavae.models.dit.parametrization import velocity_to_data
from vavae.models.dit.routing import TokenFusion, put_tokens, take_tokens


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
        state, label = x.to(self.x_embedder.proj.weight.dtype), self.y_embedder(y)
        latents, time = state[:, : self.latent_dim], self._time(t, end, guidance)
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

    def _time(self, t: Tensor, end: Tensor | None, guidance: Tensor | None) -> Tensor:
        """Embedding [B, D] of the times, of the lengths up to `end` and of the guidance, see `predict`."""
        assert end is None or self.length_embedder is not None, "a model of velocities"
        assert guidance is None or self.guidance_embedder is not None, "a model without guidance as an input"
        time = self.t_embedder(t)
        if self.length_embedder is not None:
            time = time + self.length_embedder(torch.zeros_like(t) if end is None else end - t)
        if self.guidance_embedder is not None:
            time = time + self.guidance_embedder(t.new_tensor([[1, 0, 1]]) if guidance is None else guidance)
        return time

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
