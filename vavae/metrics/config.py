"""Configuration of the metrics: feature extractors and latent-space densities."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from vavae.config import Config, added, identity, runtime
from vavae.models.backbones.config import EMBEDDED_WEIGHTS, BackboneConfig, InceptionConfig, WeightsPath

ExtractorName = Literal[
    "efficientnet_lite0",
    "efficientnet_lite2",
    "inception",
    "dinov2_small",
    "dinov2_base",
    "dinov2_large",
    "dinov2_large_256",
    "convnextv2_base",
    "mae_large",
    "siglip2_so400m",
    "clip_large",
]
"""Name of an extractor: an embedded network, that of FID, a DINOv2 at 224 px (published with the large one), or one of
the five others of FDr6."""

PUBLISHED_DIVISORS: Mapping[ExtractorName, float] = {
    "inception": 1.68,
    "convnextv2_base": 56.87,
    "dinov2_large_256": 14.19,
    "mae_large": 0.04,
    "siglip2_so400m": 0.60,
    "clip_large": 5.60,
}
"""Fréchet distances of ImageNet's validation images to its training images at 256 px (FDr6, arXiv 2604.28190)."""

_FDR_NETWORKS: Mapping[str, str] = {
    "dinov2_large_256": "vit_large_patch14_dinov2.lvd142m",
    "convnextv2_base": "convnextv2_base.fcmae_ft_in22k_in1k",
    "mae_large": "vit_large_patch16_224.mae",
    "siglip2_so400m": "vit_so400m_patch14_siglip_224.v2_webli",
    "clip_large": "vit_large_patch14_clip_224.openai",
}
"""Networks of FDr6 in timm, by the name of the extractor."""


class ExtractorWeights(Config):
    """Weights of extractors, as `teacher.weights`; none means timm's repository on the hub."""

    dinov2_large_256: WeightsPath | None = None
    """Weights of DINOv2-L at 256 px."""
    convnextv2_base: WeightsPath | None = None
    """Weights of ConvNeXt V2."""
    mae_large: WeightsPath | None = None
    """Weights of MAE."""
    siglip2_so400m: WeightsPath | None = None
    """Weights of SigLIP 2."""
    clip_large: WeightsPath | None = None
    """Weights of CLIP."""


class MetricsConfig(Config):
    """Settings of the metrics of sets of images."""

    extractor: ExtractorName = "efficientnet_lite0"
    """Network whose features the metrics of sets compare; values of two extractors do not compare."""
    further_extractors: tuple[ExtractorName, ...] = ()
    """Further extractors for the Fréchet distances; the names of those metrics end in the extractor's."""
    inception: InceptionConfig = InceptionConfig()
    """Weights of the extractor `inception`."""
    dinov2_weights: WeightsPath | None = None
    """Weights of the DINOv2 at 224 px among the extractors, as `teacher.weights`; none means timm's repository on the
    hub."""
    weights: ExtractorWeights = added(ExtractorWeights())
    """Weights of the networks of FDr6 among the extractors."""
    batch_size: int = runtime(64, ge=1)
    """Images per forward pass of the extractor."""

    @property
    def extractors(self) -> tuple[ExtractorName, ...]:
        """Names of all extractors, the main one first."""
        return tuple(dict.fromkeys((self.extractor, *self.further_extractors)))

    def backbone(self, name: ExtractorName) -> BackboneConfig | None:
        """The network of timm behind an extractor; none for `inception`, which timm does not have."""
        if name == "inception":
            return None
        if name in EMBEDDED_WEIGHTS:
            return BackboneConfig(name=name)
        if name in _FDR_NETWORKS:
            return BackboneConfig(name=_FDR_NETWORKS[name], weights=getattr(self.weights, name))
        size = name.removeprefix("dinov2_")
        return BackboneConfig(name=f"vit_{size}_patch14_dinov2.lvd142m", weights=self.dinov2_weights)

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that the features of images depend on, besides the images."""
        described: dict[str, Any] = {}
        for name in self.extractors:
            backbone = self.backbone(name)
            described[name] = self.inception.sha256 if backbone is None else identity(backbone)
        return described


class MindConfig(Config):
    """Settings of the distance MIND: the mean over directions of the squared distance of sorted projections."""

    directions: int = Field(1_000, ge=1)
    """Random directions."""
    samples: int = Field(5_000, ge=2)
    """Images of each set, generated and real; fewer where there are fewer of either."""


LATENT_PROBES: Mapping[str, Literal["higher", "lower"]] = {
    "latent_spectrum_slope": "lower",
    "latent_effective_rank": "higher",
    "latent_local_to_global": "higher",
    "latent_high_frequency_share": "lower",
    "latent_velocity_variance": "lower",
    "equivariance_error_quarter_turn": "lower",
    "equivariance_error_half_size": "lower",
}
"""Names of the cheap probes of a tokenizer, and which way is said to be better for what is trained on its latents."""


class LatentProbesConfig(Config):
    """Settings of the cheap probes of a tokenizer, which are of the first held-out images of some classes."""

    images_per_class: int = Field(50, ge=2)
    """Images of each class. The variance of the velocity is a mean over the classes that have so many: it rises with
    their number, so equal ones compare. Images without classes are one class."""
    classes: int = Field(20, ge=1)
    """Classes, evenly among all; all where there are fewer."""


class LatentSpaceConfig(Config):
    """Settings of the density metrics of the paper's Table 6; a map of 10,000 tokens takes minutes."""

    tokens: int = Field(10_000, ge=100)
    """Latent vectors that are mapped at a time, each of another training image; fewer where there are fewer images."""
    samplings: int = Field(10, ge=1)
    """Number of samplings of tokens; the metrics are means over the samplings, with their standard deviation."""
    processes: int = runtime(1, ge=1)
    """Samplings that are mapped at the same time."""
