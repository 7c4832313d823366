"""Feature extractors: images to the features that the metrics of a set compare."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae.metrics.config import ExtractorName, MetricsConfig
from vavae.models.backbones.inception import POOLED_DIM, load_inception
from vavae.models.backbones.load import load_backbone, meta_backbone
from vavae.models.backbones.normalize import ImageNormalizer


class Features(NamedTuple):
    """Features of a batch of images, float32."""

    pooled: Tensor
    """Pooled features [B, D]."""
    spatial: Tensor | None = None
    """Spatial features [B, S], which keep positions; of Inception alone."""
    logits: Tensor | None = None
    """Logits [B, C] of ImageNet's classes; of Inception alone."""


class Description(NamedTuple):
    """Properties of an extractor that are known without its weights."""

    name: ExtractorName
    num_features: int
    """Length D of a pooled feature vector."""
    protocol: str
    """Protocol of the extractor, in words, for readers of its metrics."""


def describe(name: ExtractorName, config: MetricsConfig) -> Description:
    """Describe an extractor without loading its weights."""
    backbone = config.backbone(name)
    if backbone is None:
        return Description(
            name, POOLED_DIM, f"{name}, pooled features, images resized to 299 px (bilinear, as TensorFlow 1 does)"
        )
    preprocessing = _preprocessing(name)
    model: Any = meta_backbone(backbone)
    resize = f"images resized to {preprocessing.size} px ({preprocessing.mode}, antialiased)"
    return Description(name, model.num_features, f"{name}, {preprocessing.output}, {resize}")


class FeatureExtractor(nn.Module):
    """A frozen pretrained network; torchmetrics accepts it as ``feature=``.

    Args:
        description: name, size and protocol; ``num_features`` is taken from it.
    """

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description
        self.num_features = description.num_features

    def features(self, images: Tensor) -> Features:
        """Extract all features of images uint8 [B, 3, H, W]."""
        raise NotImplementedError

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [B, D], float32, of images uint8 [B, 3, H, W]."""
        return self.features(images).pooled


class _Preprocessing(NamedTuple):
    """Preprocessing of images for a network of timm, and the output that is taken."""

    size: int
    """Side in pixels."""
    mode: Literal["bilinear", "bicubic"]
    output: str
    """Output of the network that is taken, in words."""
    timm_kwargs: dict[str, bool]


def _preprocessing(name: ExtractorName) -> _Preprocessing:
    return _DINOV2 if name.startswith("dinov2") else _EFFICIENTNET


# Smaller than in its training, for small images on a CPU.
_EFFICIENTNET = _Preprocessing(96, "bilinear", "pooled features", {})
# Stein et al. 2023, with the scaling of EDM2; position embeddings are resampled by timm.
_DINOV2 = _Preprocessing(224, "bicubic", "class token", {"dynamic_img_size": True})


class TimmExtractor(FeatureExtractor):
    """A network of timm without its classifier.

    Attributes:
        input_size: side in pixels to which images are resized.
    """

    def __init__(self, name: ExtractorName, config: MetricsConfig) -> None:
        super().__init__(describe(name, config))
        backbone, preprocessing = config.backbone(name), _preprocessing(name)
        assert backbone is not None, f"{name} is no network of timm"
        model: Any = load_backbone(backbone, num_classes=0, **preprocessing.timm_kwargs)
        self.model, self.normalize = model, ImageNormalizer.of(model)
        self.input_size, self._mode = preprocessing.size, preprocessing.mode

    @torch.inference_mode()
    def features(self, images: Tensor) -> Features:
        """Extract all features of images uint8 [B, 3, H, W]."""
        return Features(self.model(self.normalize(preprocess(images, self.input_size, self._mode))).float())


class InceptionExtractor(FeatureExtractor):
    """The network of FID, sFID and the Inception score, which resizes images itself."""

    def __init__(self, config: MetricsConfig) -> None:
        super().__init__(describe("inception", config))
        self.model = load_inception(config.inception)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Features:
        """Extract all features of images uint8 [B, 3, H, W]."""
        return Features(*self.model(images))


def load_extractor(name: ExtractorName, config: MetricsConfig) -> FeatureExtractor:
    """Load the extractor of a name with its weights.

    Raises:
        UserError: its weights or packages cannot be had; the message says what to fetch.
    """
    return InceptionExtractor(config) if name == "inception" else TimmExtractor(name, config)


def preprocess(images: Tensor, size: int, mode: Literal["bilinear", "bicubic"] = "bilinear") -> Tensor:
    """Resize images for a network of timm: uint8 [B, 3, H, W] to float32 [B, 3, size, size] in [-1, 1].

    With antialiasing and not rounded to 8 bits afterwards: both are known to shift Fréchet distances (Parmar et al.
    2022).
    """
    assert images.dtype == torch.uint8, f"images are uint8, not {images.dtype}"
    pixels = images.float() / 127.5 - 1
    return F.interpolate(pixels, (size, size), mode=mode, align_corners=False, antialias=True)
