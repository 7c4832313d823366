"""Sizes and switches of the LightningDiT, without torch."""

from typing import Literal, NamedTuple

from pydantic import Field, model_validator
from typing_extensions import Self

from vavae.config import Config, added, runtime
from vavae.errors import UserError


class TransformerShape(NamedTuple):
    """Depth, width and number of heads of a transformer."""

    depth: int
    width: int
    heads: int

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads


Size = Literal["S", "B", "L", "XL", "1p0B", "1p6B"]

SIZES: dict[Size, TransformerShape] = {
    "S":    TransformerShape(depth=12, width= 384, heads= 6),
    "B":    TransformerShape(depth=12, width= 768, heads=12),
    "L":    TransformerShape(depth=24, width=1024, heads=16),
    "XL":   TransformerShape(depth=28, width=1152, heads=16),
    "1p0B": TransformerShape(depth=24, width=1536, heads=24),
    "1p6B": TransformerShape(depth=28, width=1792, heads=28),
}  # fmt: skip


class IntermediateHeadConfig(Config):
    """A second output layer, after an inner block (internal guidance, arXiv 2512.24176)."""

    after_block: int = Field(8, ge=1)
    """Number of blocks that come before it."""


class WideHeadConfig(Config):
    """Blocks of another width after the others, which read the latents again (DDT, arXiv 2504.05741; wide in RAE)."""

    depth: int = Field(2, ge=1)
    """Its blocks."""
    width: int = Field(2048, ge=4)
    """Channels of its tokens; the published rule is no fewer than the patch_size² · C values of a token."""
    heads: int = Field(16, ge=1)
    """Its attention heads."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        return self


class LightningDiTConfig(Config):
    """A named size, or one written out, and the switches of table 1 of the paper; the defaults are its full model."""

    size: Size | None = "XL"
    """A row of the registry; null takes `depth`, `width` and `heads` as written here."""
    depth: int | None = Field(None, ge=1)
    """Transformer blocks; overrides the size's."""
    width: int | None = Field(None, ge=4)
    """Channels of a token; overrides the size's."""
    heads: int | None = Field(None, ge=1)
    """Attention heads; overrides the size's."""
    patch_size: int = Field(1, ge=1)
    """Side of the square of latent positions that makes one token."""
    classes: int | None = Field(None, ge=0)
    """Labels; one more embedding stands for "no label", alone where there are none: the model is unconditional then.
    Null takes as many as the latents have."""
    qk_norm: bool = True
    """Normalize queries and keys per head; the released weights have it off, long runs diverge without it."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward layer; both have about the same number of weights."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalization: RMSNorm with a weight, or the LayerNorm of DiT without one."""
    rope: bool = True
    """Rotate queries and keys by row and column, beside the sin-cos embedding that is always added."""
    shift: bool = True
    """Let the adaptive layer norm of the blocks shift as well as scale and gate."""
    intermediate_head: IntermediateHeadConfig | None = added(None)
    """Predict the velocity after an inner block, too; `guidance.internal_scale` guides by it, as it is the weaker one.
    Null builds none."""
    head: WideHeadConfig | None = added(None)
    """Blocks after those of `depth`, of a width of their own, which the others tell for each token what to do: a latent
    of many channels asks for width at the end (RAE, arXiv 2510.11690). Null builds none."""
    prediction: Literal["velocity", "data"] = added("velocity")
    """Output of the network: the velocity, or the data, from which the velocity follows (x-prediction)."""
    checkpoint_activations: bool = runtime(False)
    """Recompute each block in the backward pass: less memory for about a third more time."""

    def with_classes(self, classes: int) -> Self:
        """The configuration for data of so many classes; UserError where another number is written."""
        if self.classes not in (None, classes):
            raise UserError(f"lightningdit.classes={self.classes}, but the data has {classes}: correct or remove it")
        return self.model_copy(update={"classes": classes})

    @property
    def head_blocks(self) -> Self:
        """The configuration of the blocks and the output layer of the head; itself where there is none."""
        if self.head is None:
            return self
        return self.model_copy(update={"size": None, **self.head.model_dump()})

    @property
    def predicts_data(self) -> bool:
        """Whether the network predicts the data; there is no velocity at t = 1 then."""
        return self.prediction == "data"

    @property
    def shape(self) -> TransformerShape:
        """Depth, width and heads after overrides."""
        preset = SIZES[self.size]._asdict() if self.size else {}
        written = {name: getattr(self, name) for name in TransformerShape._fields if getattr(self, name) is not None}
        return TransformerShape(**{**preset, **written})

    @model_validator(mode="after")
    def _shape_is_complete_and_divides(self) -> Self:
        missing = [name for name in TransformerShape._fields if getattr(self, name) is None]
        if self.size is None and missing:
            raise ValueError(
                f"size is null, so give {', '.join(missing)} as well, or one of {', '.join(SIZES)} as size"
            )
        depth, width, heads = self.shape
        if self.intermediate_head is not None and self.intermediate_head.after_block > depth:
            raise ValueError(
                f"intermediate_head.after_block={self.intermediate_head.after_block} exceeds depth={depth}: lower it"
            )
        if width % 4:
            raise ValueError(f"width={width} must be a multiple of 4: sine and cosine of row and column share it")
        if width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}")
        if self.rope and self.shape.head_dim % 4:
            raise ValueError(
                f"width={width} / heads={heads} = {self.shape.head_dim} must be a multiple of 4 for rope, "
                "which rotates pairs by row and by column: change heads or set rope to false"
            )
        if self.rope and self.head_blocks.shape.head_dim % 4:
            _, width, heads = self.head_blocks.shape
            raise ValueError(
                f"head.width={width} / head.heads={heads} must be a multiple of 4 for rope: change head.heads or set "
                "rope to false"
            )
        return self
