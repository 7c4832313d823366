"""Configuration of the autoencoder and of its teacher."""

import difflib
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

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


class TokenizerConfig(Config):
    """The KL autoencoder of LDM, as VA-VAE uses it; the defaults are the paper's f16d32."""

    latent_dim: int = Field(32, gt=0)
    """Channels of the latent."""

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
        return 2 ** (len(self.channel_multipliers) - 1)

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
