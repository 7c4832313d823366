"""From images to the features that the measures of a set compare."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae.metrics.config import ExtractorName, MetricsConfig
from vavae.models.backbones.inception import POOLED_DIM, load_inception
from vavae.models.backbones.load import load_backbone, meta_backbone
from vavae.models.backbones.normalize import ImageNormalizer


class Features(NamedTuple):
    """What an extractor sees in a batch of images, float32."""

    pooled: Tensor
    """[B, D]."""
    spatial: Tensor | None = None
    """[B, S], where things are; of Inception alone."""
    logits: Tensor | None = None
    """[B, C], of the classes of ImageNet; of Inception alone."""


class Description(NamedTuple):
    """What is known of an extractor without its weights."""

    name: ExtractorName
    num_features: int
    """D, the length of a pooled feature vector."""
    protocol: str
    """What a reader must know about the figures made with it."""


def describe(name: ExtractorName, config: MetricsConfig) -> Description:
    """Tell about an extractor."""
    backbone = config.backbone(name)
    if backbone is None:
        return Description(
            name, POOLED_DIM, f"{name}, pooled features, images resized to 299 px (bilinear, as TensorFlow 1 does)"
        )
    look = _look(name)
    model: Any = meta_backbone(backbone)
    protocol = f"{name}, {look.takes}, images resized to {look.size} px ({look.mode}, antialiased)"
    return Description(name, model.num_features, protocol)


class FeatureExtractor(nn.Module):
    """A frozen pretrained network; torchmetrics accepts it as ``feature=``.

    Args:
        description: what it is; ``num_features`` is taken from it.
    """

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description
        self.num_features = description.num_features

    def features(self, images: Tensor) -> Features:
        """All that it sees in images [B, 3, H, W] in uint8."""
        raise NotImplementedError

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [B, D] of images [B, 3, H, W] in uint8."""
        return self.features(images).pooled


class _Look(NamedTuple):
    """How a network of timm is shown images, and what is taken of it."""

    size: int
    """Side in pixels."""
    mode: Literal["bilinear", "bicubic"]
    takes: str
    timm_kwargs: dict[str, bool]


def _look(name: ExtractorName) -> _Look:
    return _DINOV2 if name.startswith("dinov2") else _EFFICIENTNET


# Smaller than in its training, for small images on a CPU.
_EFFICIENTNET = _Look(96, "bilinear", "pooled features", {})
# Stein et al. 2023, with the scaling of EDM2; position embeddings are resampled by timm.
_DINOV2 = _Look(224, "bicubic", "class token", {"dynamic_img_size": True})


class TimmExtractor(FeatureExtractor):
    """A network of timm without its classifier.

    Attributes:
        input_size: side in pixels to which images are resized.
    """

    def __init__(self, name: ExtractorName, config: MetricsConfig) -> None:
        super().__init__(describe(name, config))
        backbone, look = config.backbone(name), _look(name)
        assert backbone is not None, f"{name} is no network of timm"
        model: Any = load_backbone(backbone, num_classes=0, **look.timm_kwargs)
        self.model, self.normalize = model, ImageNormalizer.of(model)
        self.input_size, self._mode = look.size, look.mode

    @torch.inference_mode()
    def features(self, images: Tensor) -> Features:
        """See :class:`FeatureExtractor`."""
        return Features(self.model(self.normalize(preprocess(images, self.input_size, self._mode))).float())


class InceptionExtractor(FeatureExtractor):
    """The network of FID, sFID and the Inception score, which resizes images itself."""

    def __init__(self, config: MetricsConfig) -> None:
        super().__init__(describe("inception", config))
        self.model = load_inception(config.inception)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Features:
        """See :class:`FeatureExtractor`."""
        return Features(*self.model(images))


def load_extractor(name: ExtractorName, config: MetricsConfig) -> FeatureExtractor:
    """The extractor of a name with its weights.

    Raises:
        UserError: its weights or packages cannot be had; the message says what to fetch.
    """
    return InceptionExtractor(config) if name == "inception" else TimmExtractor(name, config)


def preprocess(images: Tensor, size: int, mode: Literal["bilinear", "bicubic"] = "bilinear") -> Tensor:
    """The only road to a network of timm: uint8 [B, 3, H, W] to float32 [B, 3, size, size] in [-1, 1].

    With antialiasing and not rounded to 8 bits afterwards: both are known to shift Fréchet distances (Parmar et al.
    2022).
    """
    assert images.dtype == torch.uint8, f"images are uint8, not {images.dtype}"
    pixels = images.float() / 127.5 - 1
    return F.interpolate(pixels, (size, size), mode=mode, align_corners=False, antialias=True)
