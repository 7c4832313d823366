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
    """Number of blocks in the head."""
    width: int = Field(2048, ge=4)
    """Channels of its tokens; the published rule is no fewer than the patch_size² · C values of a token."""
    heads: int = Field(16, ge=1)
    """Attention heads of its blocks."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        return self


class ClassTokenConfig(Config):
    """A teacher's vector of the whole image, which is noised and denoised beside the latent (REG, arXiv 2507.01467)."""

    width: int = Field(768, ge=1)
    """Its channels: those of the features of `latents.features.teacher`. DINOv2-B has 768."""


def count_kept(tokens: int, drop: float) -> int:
    """Tokens of an image that skip no block where such a share does: N - ⌊N · drop⌋."""
    return tokens - int(tokens * drop)


class FuseConfig(Config):
    """A layer after the blocks that tokens skip, which joins each token to what it was before them (SPRINT)."""

    path_dropout: float = Field(0.1, ge=0, lt=1)
    """Probability that an image is trained as if all its tokens had skipped, which `guidance.path_drop` needs."""
    structured: bool = True
    """Draw as many tokens in every square of 2 x 2 tokens, or of 4 x 4, instead of any."""


class RoutingConfig(Config):
    """Blocks that a share of each image's tokens skips in training (TREAD, arXiv 2501.04765); samples skip none."""

    first_block: int = Field(2, ge=0)
    """First block that they skip, counted from 0 as in the names of the weights."""
    last_block: int = Field(ge=0)
    """Last block that they skip."""
    drop: float = Field(0.5, gt=0, lt=1)
    """Share of the tokens that skip, rounded down to whole tokens; they are drawn anew for every image of a step."""
    until_images: int | None = Field(None, ge=1)
    """Images seen from which on no token skips any more; null never ends it."""
    fuse: FuseConfig | None = None
    """Join all tokens by a layer after those blocks (SPRINT, arXiv 2510.21986); null: tokens that skip stay as they
    were."""

    @property
    def blocks(self) -> range:
        """Indices of the blocks that tokens skip."""
        return range(self.first_block, self.last_block + 1)

    def drop_at(self, images_seen: int) -> float:
        """Share of the tokens that skip at a position in the training."""
        return self.drop if self.until_images is None or images_seen < self.until_images else 0.0

    def sees_all_tokens_after(self, block_count: int) -> bool:
        """Return whether no token is skipping after so many blocks."""
        return not self.first_block < block_count <= self.last_block

    @property
    def square(self) -> int | None:
        """Side of the squares of tokens, in each of which as many are drawn; None where any are."""
        if self.fuse is None or not self.fuse.structured:
            return None
        return 2 if (4 * self.drop).is_integer() else 4

    @model_validator(mode="after")
    def _squares_hold_whole_tokens(self) -> Self:
        if self.square is not None and not (16 * self.drop).is_integer():
            raise ValueError(
                f"drop={self.drop:g} is no whole number of the 16 tokens of a square: set it to a multiple of 0.0625, "
                "or fuse.structured to false"
            )
        return self

    @model_validator(mode="after")
    def _blocks_are_ordered(self) -> Self:
        if self.last_block < self.first_block:
            raise ValueError(f"last_block={self.last_block} lies before first_block={self.first_block}: raise it")
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
    average_velocity: bool = added(False)
    """Predict the average velocity from t to a later time, whose distance is embedded as t is; at no distance it is the
    velocity. `objective.mean_flow` trains it, `solver.name=mean_flow` takes steps by it (arXiv 2505.13447)."""
    guidance_inputs: bool = added(False)
    """Take the scale and the interval of a guidance as inputs, and predict the velocity by a second output layer, too:
    `objective.mean_flow.max_scale` trains both (improved MeanFlow, arXiv 2512.02012)."""
    routing: RoutingConfig | None = added(None)
    """Train some blocks on a part of the tokens; null trains all on all."""
    conditioning: Literal["adaln", "in_context"] = added("adaln")
    """Way of time and label into the blocks: adaptive layer norms, or further tokens behind those of the latent, in
    blocks that have no modulation, nor the sin-cos embedding (RAEv2, arXiv 2605.18324)."""
    time_tokens: int = added(4, ge=1)
    """Tokens that tell the time, with `conditioning: in_context`."""
    label_tokens: int = added(8, ge=1)
    """Tokens that tell the label, likewise."""
    class_token: ClassTokenConfig | None = added(None)
    """Denoise the class token that `latents.features.class_token` stores, too; null denoises the latent alone."""
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
        return self.model_copy(update={"size": None, "conditioning": "adaln", **self.head.model_dump()})

    @property
    def predicts_data(self) -> bool:
        """True where the network predicts the data; there is no velocity at t = 1 then."""
        return self.prediction == "data"

    @property
    def in_context(self) -> bool:
        """True where time and label are tokens."""
        return self.conditioning == "in_context"

    @property
    def shape(self) -> TransformerShape:
        """Depth, width and heads after overrides."""
        preset = SIZES[self.size]._asdict() if self.size else {}
        written = {name: getattr(self, name) for name in TransformerShape._fields if getattr(self, name) is not None}
        return TransformerShape(**{**preset, **written})

    def tokens_of(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens of latents of a grid."""
        return grid[0] // self.patch_size, grid[1] // self.patch_size

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
        self._check_routing(depth)
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

    def _check_routing(self, depth: int) -> None:
        routing, head = self.routing, self.intermediate_head
        if routing is None:
            return
        if routing.last_block >= depth:
            raise ValueError(f"routing.last_block={routing.last_block} is none of {depth} blocks, 0 to {depth - 1}")
        if head is not None and not routing.sees_all_tokens_after(head.after_block):
            raise ValueError(
                f"intermediate_head.after_block={head.after_block} lies among the blocks that tokens skip, "
                f"{routing.first_block} to {routing.last_block}: choose at most {routing.first_block} or more than "
                f"{routing.last_block}"
            )

    @model_validator(mode="after")
    def _class_token_fits(self) -> Self:
        if self.class_token is None:
            return self
        if self.head is not None:
            raise ValueError("class_token with head, whose tokens are those of the latent alone: leave one of them out")
        if self.routing is not None and self.routing.fuse is not None:
            raise ValueError("routing.fuse joins tokens that may all skip, and class_token never does: leave one out")
        return self

    @model_validator(mode="after")
    def _conditioning_fits(self) -> Self:
        if not self.in_context:
            for name in ("time_tokens", "label_tokens"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name}={getattr(self, name)} is of conditioning=in_context, and it is {self.conditioning}: "
                        "leave it out"
                    )
            return self
        if not self.rope:
            raise ValueError("rope=false with conditioning=in_context, whose tokens know their places by it: set true")
        if not self.shift and self.head is None:
            raise ValueError("shift=false is of adaptive layer norms, and conditioning=in_context: leave it out")
        if self.routing is not None and self.routing.fuse is not None:
            raise ValueError(
                "routing.fuse joins tokens that may all skip, and those of conditioning=in_context never do: leave "
                "fuse out, or set conditioning to adaln"
            )
        return self
