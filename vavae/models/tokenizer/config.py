"""Configuration of the autoencoder and of its teacher."""

import difflib
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from vavae.config import Config, added, runtime
from vavae.models.backbones.config import EMBEDDED, EMBEDDED_WEIGHTS, BackboneConfig

TEACHERS = {
    "dinov2_small": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_base": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_large": "vit_large_patch14_dinov2.lvd142m",
    "dinov2_small_registers": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2_base_registers": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2_large_registers": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov3_small": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3_base": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3_large": "vit_large_patch16_dinov3.lvd1689m",
    "mae_base": "vit_base_patch16_224.mae",
    "mae_large": "vit_large_patch16_224.mae",
    "clip_base": "vit_base_patch16_clip_quickgelu_224.openai",
    "clip_large": "vit_large_patch14_clip_quickgelu_224.openai",
    "sam_base": "samvit_base_patch16.sa1b",
    "sam_large": "samvit_large_patch16.sa1b",
    "siglip2_base": "vit_base_patch16_siglip_256.v2_webli",
    "siglip2_large": "vit_large_patch16_siglip_256.v2_webli",
}
"""Short names of the teachers in use and their names in timm; the released tokenizers used large DINOv2 or MAE."""


class TeacherConfig(BackboneConfig):
    """The vision foundation model whose features the latents are aligned with."""

    name: str = EMBEDDED
    """A short name of `TEACHERS`, an embedded network (`efficientnet_lite0`, `efficientnet_lite2`), or any timm model
    with its tag."""

    normalize: bool = True
    """Give the teacher the image statistics that it was trained with; false hands it [-1, 1], as the released code."""

    stage_stride: int | None = Field(None, gt=0)
    """Pixels per feature at the feature level to use, in a teacher of falling resolution; none means 16."""

    project: bool = False
    """Project the tokens by the linear head that the class token has: of CLIP, into the space that it shares with
    text. The authors took the 512 projected channels of CLIP, as `{name: clip_base, project: true}` gives them."""

    @field_validator("name")
    @classmethod
    def _spelled(cls, name: str) -> str:
        near = difflib.get_close_matches(name, TEACHERS, n=1, cutoff=0.85)
        if near and name not in TEACHERS:
            raise ValueError(
                f"teacher {name!r}: did you mean {near[0]}? There are {', '.join([*TEACHERS, *EMBEDDED_WEIGHTS])}, "
                "and the models of timm"
            )
        return name

    @property
    def backbone(self) -> BackboneConfig:
        """The network under its full name."""
        return BackboneConfig(name=TEACHERS.get(self.name, self.name), weights=self.weights)


_OF_KL = (
    *("channels", "channel_multipliers", "res_blocks", "attention_levels", "norm_groups"),
    *("middle_attention", "quant_conv", "post_quant_conv"),
)
"""Keys of `TokenizerConfig` that a representation autoencoder does not have."""


class EncoderConfig(TeacherConfig):
    """The frozen encoder of a representation autoencoder: any network that can be a teacher.

    Its latent is the output of one layer, normalized at each position over its channels, or a mean of several (RAEv2,
    arXiv 2605.18324).
    """

    layers: tuple[int, ...] | None = None
    """Blocks of a transformer, counted from 0, whose normalized outputs are averaged; null takes the last one alone.
    Published with `dinov3_large`: [11, 13, 15, 17, 19, 21, 23]."""

    global_mean: bool = False
    """Add the mean over all positions of the last of these layers to each position, as published with DINOv3."""

    @model_validator(mode="after")
    def _layers_rise(self) -> Self:
        if self.project:
            raise ValueError("project=true is of a teacher; an encoder gives what its layers give: leave it out")
        if self.layers is None:
            if self.global_mean:
                raise ValueError("global_mean=true is of several layers: give layers, or leave it out")
        elif not self.layers or self.layers[0] < 0 or [*self.layers] != sorted({*self.layers}):
            raise ValueError(f"layers {[*self.layers]}: give indices of blocks from 0, in rising order, each once")
        return self


class ViTShape(NamedTuple):
    """Sizes of a transformer with plain blocks."""

    width: int
    depth: int
    heads: int
    mlp_width: int


DecoderSize = Literal["B", "L", "XL"]

DECODER_SIZES: dict[DecoderSize, ViTShape] = {
    "B":  ViTShape(width= 768, depth=12, heads=12, mlp_width=3072),
    "L":  ViTShape(width=1024, depth=24, heads=16, mlp_width=4096),
    "XL": ViTShape(width=1152, depth=28, heads=16, mlp_width=4096),
}  # fmt: skip
"""Published decoders; RAE's and RAEv2's figures are those of XL."""


class ViTDecoderConfig(Config):
    """The decoder of a representation autoencoder: a transformer of MAE's form, one token for each latent position."""

    patch_size: int = Field(16, ge=1)
    """Pixels of a patch along one side, which is what a latent position stands for."""

    size: DecoderSize | None = "XL"
    """A published size; null takes the four numbers below."""

    width: int | None = Field(None, ge=4)
    """Channels of a token, a multiple of 4 and of `heads`."""

    depth: int | None = Field(None, ge=1)
    """Number of blocks."""

    heads: int | None = Field(None, ge=1)
    """Attention heads of a block."""

    mlp_width: int | None = Field(None, ge=1)
    """Channels between the two layers of a block's network; null means four times `width`."""

    unit_output: bool = False
    """The last layer gives colors in [0, 1], as in RAEv2, instead of [-1, 1]; decoded images are in [-1, 1] either
    way."""

    @property
    def shape(self) -> ViTShape:
        """Sizes of the transformer."""
        if self.size is not None:
            return DECODER_SIZES[self.size]
        width, depth, heads = (value or 0 for value in (self.width, self.depth, self.heads))  # validated: none is null
        return ViTShape(width, depth, heads, self.mlp_width or 4 * width)

    @model_validator(mode="after")
    def _has_one_shape(self) -> Self:
        given = {name: getattr(self, name) for name in ViTShape._fields}
        if self.size is not None:
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"{name}={value} beside size={self.size}: set size=null, or leave {name} out")
            return self
        for name, value in given.items():
            if value is None and name != "mlp_width":
                raise ValueError(f"size=null needs {name}: give it")
        width, _, heads, _ = self.shape
        if width % heads or width % 4:
            raise ValueError(f"width={width} must be a multiple of 4 and of heads={heads}")
        return self


class TokenizerConfig(Config):
    """The tokenizer: the KL autoencoder of LDM, as VA-VAE uses it, or a representation autoencoder.

    The defaults are the paper's f16d32.
    """

    kind: Literal["kl", "representation"] = added("kl")
    """`kl`: encoder and decoder are trained, and the latent is a sample of a posterior. `representation` (RAE, arXiv
    2510.11690): the latent is what a frozen `encoder` gives, and a transformer, the `decoder`, is trained alone."""

    latent_dim: int = Field(32, gt=0)
    """Channels of the latent. A frozen encoder has its own number, such as 768, which must be given."""

    encoder: EncoderConfig | None = added(None)
    """The frozen encoder of `representation`; null for `kl`, whose encoder has the keys below."""

    decoder: ViTDecoderConfig | None = added(None)
    """The decoder of `representation`; null for `kl`, likewise."""

    image_channels: Literal[1, 3, 4] = added(3)
    """Channels of the images. A run gives it `shards.channels`, which it must equal."""

    channels: int = Field(128, gt=0)
    """Channels of the first level; each level has this times its multiplier."""

    channel_multipliers: tuple[Annotated[int | float, Field(union_mode="left_to_right")], ...] = (1, 1, 2, 2, 4)
    """Multiplier of each level's channels, from the image inwards; every level but the last halves the resolution. One
    that is no integer gives integer channels all the same."""

    res_blocks: int = Field(2, gt=0)
    """Residual blocks per level of the encoder; the decoder has one more."""

    attention_levels: tuple[int, ...] = (4,)
    """Levels whose residual blocks are followed by self-attention, counted from the image inwards, from 0."""

    norm_groups: int = Field(32, gt=0)
    """Groups of every group normalization (32 in the released code); they divide `channels`. A group of one channel
    hides from the next layer how bright that channel is: a tokenizer of 32 channels learns faster with 4 groups."""

    middle_attention: bool = added(True)
    """Self-attention between the two residual blocks at the lowest resolution, of encoder and decoder."""

    quant_conv: bool = added(True)
    """A 1x1 convolution from the encoder's output to the moments; the autoencoders of FLUX and SD3 have none."""

    post_quant_conv: bool = added(True)
    """A 1x1 convolution from the latent to the decoder's input; the autoencoders of FLUX and SD3 have none."""

    checkpoint_activations: bool = runtime(False)
    """Recompute each block of every level in each backward pass: less memory for more time."""

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the image inwards."""
        return [round(self.channels * multiplier) for multiplier in self.channel_multipliers]

    @property
    def downsample(self) -> int:
        """Pixels per latent position along one side."""
        if self.decoder is not None:
            return self.decoder.patch_size
        return 2 ** (len(self.channel_multipliers) - 1)

    @model_validator(mode="after")
    def _parts_are_of_its_kind(self) -> Self:
        parts = {"encoder": self.encoder, "decoder": self.decoder}
        if self.kind == "kl":
            for name, part in parts.items():
                if part is not None:
                    raise ValueError(f"{name} is of kind=representation, and kind is kl: set it, or leave {name} out")
            return self
        for name, part in parts.items():
            if part is None:
                raise ValueError(f"kind=representation needs {name}, such as {{}}: give it")
        for name in _OF_KL:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise ValueError(f"{name}={value} is of kind=kl, and kind is representation: leave it out")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "TokenizerConfig":
        levels = len(self.channel_multipliers)
        if not levels or min(self.channel_multipliers) <= 0:
            raise ValueError(f"channel_multipliers {self.channel_multipliers}: give one positive number per level")
        for width, multiplier in zip(self.widths, self.channel_multipliers, strict=True):
            if not width or abs(width - self.channels * multiplier) > 1e-3:
                raise ValueError(
                    f"channel_multipliers {self.channel_multipliers}: {multiplier} times {self.channels} channels is "
                    "no integer"
                )
        if any(not 0 <= level < levels for level in self.attention_levels):
            raise ValueError(f"attention_levels {self.attention_levels}: there are levels 0 to {levels - 1}")
        if self.channels % self.norm_groups:
            raise ValueError(f"channels {self.channels} is not a multiple of norm_groups {self.norm_groups}")
        if any(width % self.norm_groups for width in self.widths):
            raise ValueError(
                f"levels of {self.widths} channels are not all multiples of norm_groups {self.norm_groups}"
            )
        return self
