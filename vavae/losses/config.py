"""Configuration of the losses; the defaults are those of the paper unless a line says otherwise."""

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from vavae.config import Config, added, runtime
from vavae.models.backbones.config import BackboneConfig, WeightsPath
from vavae.models.tokenizer.config import TEACHERS

NORM_GROUPS = 32
"""Groups of the discriminator's group normalization."""


class VisionFoundationLossConfig(Config):
    """Alignment of latents with the features of a vision foundation model: equations 2 to 5 of arXiv 2501.01423."""

    weight: float = Field(0.1, ge=0)
    """w_hyper of equation 5; 0 switches the term off."""

    cos_margin: float = Field(0.5, ge=0, le=2)
    """m1 of equation 2: cosines above one minus this cost nothing."""

    distmat_margin: float = Field(0.25, ge=0, le=2)
    """m2 of equation 3: differences of two cosines below this cost nothing."""

    cos_weight: float = Field(1.0, ge=0)
    """Weight of the marginal cosine loss."""

    distmat_weight: float = Field(1.0, ge=0)
    """Weight of the marginal distance matrix loss."""

    projection: Literal["latent_to_teacher", "teacher_to_latent"] = "latent_to_teacher"
    """Direction of the learned linear map (`reverse_proj` true or false in the released code)."""

    adaptive: bool = True
    """Scale by the ratio of gradient norms, equation 4; without it the weight is constant."""

    distmat_tokens_at_once: int = runtime(1024, gt=0)
    """Grids of more positions have their distance matrices made block by block, and again in the backward pass, in the
    memory that a grid of this many needs: 32 x 32 in one piece (4 MiB per image and matrix), 64 x 64 in sixteen."""


class PerceptualLossConfig(Config):
    """The perceptual part of the reconstruction loss, a distance of network features."""

    kind: Literal["lpips", "teacher_features", "none"] = "lpips"
    """LPIPS on VGG16; a distance of the teacher's early features, which needs no further weights; or nothing."""

    weight: float = Field(1.0, ge=0)
    """Weight relative to the absolute error of one color value; the term counts once per color value of the image."""

    weights: WeightsPath | None = None
    """ImageNet weights of VGG16, as a path or a storage URL; none means the Hugging Face hub's. Only for `lpips`."""

    @property
    def backbone(self) -> BackboneConfig:
        """The network of LPIPS."""
        return BackboneConfig(name="vgg16.tv_in1k", weights=self.weights)

    @property
    def smallest_side(self) -> int:
        """Least side in pixels of images that can be compared: VGG16 halves them four times."""
        return 16 if self.kind == "lpips" else 1

    @model_validator(mode="after")
    def _weights_are_used(self) -> "PerceptualLossConfig":
        if self.weights is not None and self.kind != "lpips":
            raise ValueError(f"perceptual kind {self.kind!r} reads no weights: remove them or set kind to 'lpips'")
        return self


class FeatureDiscriminatorConfig(Config):
    """A discriminator's frozen network and trained heads; the defaults are those of RAE, arXiv 2510.11690."""

    name: str = "vit_small_patch8_224.dino"
    """A short name of a teacher, an embedded network (`efficientnet_lite0`, `efficientnet_lite2`), or any timm model
    with its tag."""

    weights: WeightsPath | None = None
    """Its weights, as a path or a storage URL; none means the package's own or the Hugging Face hub's."""

    image_size: int = Field(224, gt=0)
    """Side in pixels of the images that it sees, to which all are resized."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field((11, 2, 5, 8, 11), min_length=1)
    """Blocks of a transformer, or feature levels, counted from 0: a head looks at the output of each."""

    kernel: int = Field(9, gt=0)
    """Positions, along a line through all, that the second convolution of a head takes in; odd."""

    @property
    def backbone(self) -> BackboneConfig:
        """The network under its full name."""
        return BackboneConfig(name=TEACHERS.get(self.name, self.name), weights=self.weights)

    @field_validator("kernel")
    @classmethod
    def _is_odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError(f"kernel {kernel}: take an odd number")
        return kernel


class AugmentConfig(Config):
    """Differentiable augmentation of all that a discriminator sees: translation, color, and a cut."""

    probability: float = Field(1.0, gt=0, le=1)
    """Probability of each of the three, for a micro-batch."""

    cutout: float = Field(0.0, ge=0, lt=1)
    """Side of the rectangle that is cut, as a share of the image's; 0 cuts nothing, as RAE does."""


class AdversarialLossConfig(Config):
    """A discriminator, its loss and the adversarial loss of the tokenizer."""

    kind: Literal["patch", "features"] = added("patch")
    """A patch discriminator, trained whole; or heads on the features of a frozen network, which alone are trained."""

    weight: float = Field(0.5, ge=0)
    """Weight of the generator's loss, times the adaptive weight; 0 switches discriminator and term off."""

    start_images: int = Field(2501 * 256, ge=0)
    """Images seen before the adversary joins; the released 5001 counts two optimizers and batches of 256."""

    loss: Literal["hinge", "vanilla"] = "hinge"
    """Loss of the discriminator; the generator's is the negative mean logit in both (released code)."""

    channels: int = Field(64, gt=0)
    """Channels of the first layer; they double with every layer, up to eight times."""

    layers: int = Field(3, gt=0)
    """Convolutions of stride 2."""

    norm: Literal["batch", "sync_batch", "group"] = "batch"
    """Normalization: over the images of a micro-batch, as released; over the micro-batches of one accumulation step on
    all ranks, whose number is that of the workers, on which results then depend; or within each image. The last two
    suit very small micro-batches."""

    features: FeatureDiscriminatorConfig = added(FeatureDiscriminatorConfig())
    """The network and heads of the kind `features`; `channels`, `layers` and `norm` are of the kind `patch`."""

    augment: AugmentConfig | None = added(None)
    """Augmentation of images and reconstructions before the discriminator; null augments nothing."""

    @property
    def smallest_side(self) -> int:
        """Least side in pixels of images that the discriminator takes."""
        # The patch discriminator's convolutions of stride 1 take one position each.
        return 3 * 2**self.layers if self.kind == "patch" else 1

    @model_validator(mode="after")
    def _fields_are_of_its_kind(self) -> "AdversarialLossConfig":
        for name in ("features",) if self.kind == "patch" else ("channels", "layers", "norm"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"adversarial kind {self.kind!r} reads no {name}: leave it out or at its default")
        return self

    @model_validator(mode="after")
    def _groups_divide(self) -> "AdversarialLossConfig":
        if self.norm == "group" and 2 * self.channels % NORM_GROUPS:
            raise ValueError(f"channels {self.channels} with norm 'group': take a multiple of {NORM_GROUPS // 2}")
        return self


class AdaptiveWeightConfig(Config):
    """Measurement of the adaptive weights, before the constant weight is multiplied; the limits are those released."""

    every: int = Field(1, ge=1)
    """Steps that one measurement serves, lane by lane; 1 measures in every step, as released, and costs one more
    backward pass through the decoder each time."""

    vision_foundation_max: float = Field(1e8, gt=0)
    """Upper bound for the vision-foundation loss, measured at the encoder's last convolution."""

    adversarial_max: float = Field(1e4, gt=0)
    """Upper bound for the adversarial loss, measured at the decoder's last convolution."""


class LatentNoiseConfig(Config):
    """Noise on the latents that the decoder gets in training, and nowhere else: arXiv 2507.15856 and 2510.11690.

    The level l of an image is uniform on [0, 1], its noise e standard normal.
    """

    kind: Literal["interpolate", "add"] = "interpolate"
    """`interpolate` decodes (1 - l) z + l scale e, as l-DeTok does; `add` z + l scale e, as RAE does with 0.8."""

    scale: float = Field(3.0, ge=0)
    """Standard deviation of the noise at level 1, in units of the latents; 0 switches it off."""


class EquivarianceConfig(Config):
    """Latents that are resized and turned, decoded to images resized and turned alike: EQ-VAE, arXiv 2502.09509.

    Each micro-batch has one transform or none. The scales are those that leave whole latent positions.
    """

    probability: float = Field(0.5, ge=0, le=1)
    """Share of the micro-batches whose latents are resized and turned; 0 switches that off."""

    min_scale: float = Field(0.25, gt=0, lt=1)
    """Smallest scale, of a side; the largest is a position less than the whole side."""

    turns: bool = True
    """Turn by one to three quarters, too."""

    small_images: float = Field(0.25, ge=0, le=1)
    """Share of all other micro-batches whose images are resized before they are encoded, and not turned."""

    def grids(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """Heights and widths that a latent of height and width `grid` is resized to, from the smallest on."""
        parts = math.gcd(*grid)
        height, width = grid[0] // parts, grid[1] // parts
        return [(height * part, width * part) for part in range(1, parts) if part >= self.min_scale * parts]


class TokenizerLossConfig(Config):
    """All losses of the tokenizer and their weights."""

    vision_foundation: VisionFoundationLossConfig = VisionFoundationLossConfig()
    """Alignment with the teacher."""

    perceptual: PerceptualLossConfig = PerceptualLossConfig()
    """Perceptual distance of images and reconstructions."""

    adversarial: AdversarialLossConfig = AdversarialLossConfig()
    """Adversarial loss and its discriminator."""

    adaptive: AdaptiveWeightConfig = AdaptiveWeightConfig()
    """Measurement of the two adaptive weights."""

    kl_weight: float = Field(1e-6, ge=0)
    """Weight of the KL divergence, in nats per image."""

    latent_noise: LatentNoiseConfig | None = added(None)
    """Noise on the latents that are decoded; null leaves them as they are."""

    equivariance: EquivarianceConfig | None = added(None)
    """Transforms of latents and images alike; null transforms none."""
