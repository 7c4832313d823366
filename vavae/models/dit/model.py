"""LightningDiT (arXiv 2501.01423, table 1) with the released parameter names.

Time runs from noise (t = 0) to data (t = 1); the model predicts the velocity data - noise.
Shapes: B batch, C latent channels, H x W latent grid, h x w = N tokens, D width, P patch size.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vavae.errors import UserError
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.embeddings import (
    LabelEmbedding,
    PatchEmbedding,
    RotaryEmbedding,
    TimestepEmbedding,
    sincos_position_embedding,
)
from vavae.models.dit.layers import Block, FinalLayer


class LightningDiT(nn.Module):
    """The transformer velocity(x_t, t, y) for latents of one grid.

    Args:
        config: sizes and switches.
        latent_dim: C.
        grid: H and W, or both as one number; the position tables are computed from it, see `at_grid`.
        rng: draws the initial weights; None takes torch's global one.

    Raises:
        UserError: the patches do not tile the grid.
    """

    pos_embed: Tensor

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
        self._lay_out(grid)
        self.blocks = nn.ModuleList(Block(config) for _ in range(shape.depth))
        self.final_layer = FinalLayer(config, patch * patch * latent_dim)
        initialize(self, rng)

    def _lay_out(self, grid: int | tuple[int, int], span: tuple[int, int] | None = None) -> None:
        """Set the grid and compute its position tables, on the device and in the dtype of the weights."""
        patch, shape, weight = self.config.patch_size, self.config.shape, self.x_embedder.proj.weight
        height, width = (grid, grid) if isinstance(grid, int) else grid
        if height % patch or width % patch:
            raise UserError(f"patch_size={patch} does not divide the {height} x {width} latent: choose a divisor")
        self.grid, self.tokens = (height, width), (height // patch, width // patch)
        self.span = span or self.tokens
        self.register_buffer("pos_embed", sincos_position_embedding(shape.width, self.tokens, span).to(weight))
        self.feat_rope: RotaryEmbedding | None = None
        if self.config.rope:
            self.feat_rope = RotaryEmbedding(shape.head_dim, self.tokens, span).to(weight.device, weight.dtype)

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
            x: noisy normalized latents [B, C, H, W].
            t: timesteps [B] in [0, 1].
            y: labels int64 [B] in [0, classes]; `null_label` = classes asks for the unconditional velocity.
        """
        assert x.shape[1:] == (self.latent_dim, *self.grid), f"expected [B, {self.latent_dim}, {self.grid}]: {x.shape}"
        tokens = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed  # [B, N, D]
        activated = F.silu(self.t_embedder(t) + self.y_embedder(y))  # [B, D], what every modulation starts with
        rotation = None if self.feat_rope is None else self.feat_rope()
        recompute = self.config.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                tokens = checkpoint(block, tokens, activated, rotation, use_reentrant=False)
            else:
                tokens = block(tokens, activated, rotation)
        return self._unpatchify(self.final_layer(tokens, activated)).to(x.dtype)

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """Join tokens [B, N, P · P · C] to latents [B, C, H, W]; within a token the channel varies fastest."""
        patch = self.config.patch_size
        x = tokens.unflatten(1, self.tokens).unflatten(-1, (patch, patch, self.latent_dim))  # [B, h, w, P, P, C]
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.latent_dim, *self.grid)


@torch.no_grad()
def initialize(model: LightningDiT, rng: torch.Generator | None = None) -> None:
    """Set all parameters as published: Xavier, but zero for the modulations and the output (adaLN-zero)."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
            nn.init.zeros_(parameter)
        elif name.startswith(("t_embedder", "y_embedder")):
            nn.init.normal_(parameter, std=0.02, generator=rng)
        elif parameter.ndim == 1:
            nn.init.ones_(parameter)  # the weight of a norm
        else:
            nn.init.xavier_uniform_(parameter.flatten(1), generator=rng)  # a convolution as the linear map it is
