"""From images to the features that a Fréchet distance compares."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae.backbones.config import BackboneConfig
from vavae.backbones.load import load_backbone
from vavae.backbones.normalize import ImageNormalizer

_INPUT_SIZES = {"efficientnet_lite0": 96}
"""Side in pixels of what an extractor sees: smaller than in its training, for small images on a CPU."""


class FeatureExtractor(nn.Module):
    """Pooled features of a frozen pretrained network; torchmetrics accepts it as ``feature=``.

    Attributes:
        num_features: D, the length of a feature vector.
        input_size: side in pixels to which images are resized.
        protocol: what a reader must know about the figures made with it.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        assert name in _INPUT_SIZES, f"no extractor {name!r}; there are {sorted(_INPUT_SIZES)}"
        model: Any = load_backbone(BackboneConfig(name=name), num_classes=0)
        self.model = model
        self.normalize = ImageNormalizer(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
        self.input_size = _INPUT_SIZES[name]
        self.num_features: int = model.num_features
        self.protocol = f"{name}, pooled features, images resized to {self.input_size} px (bilinear, antialiased)"

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Features [B, D] in float32 of images [B, 3, H, W] in uint8."""
        return self.model(self.normalize(preprocess(images, self.input_size))).float()


def preprocess(images: Tensor, size: int) -> Tensor:
    """The only road to an extractor: uint8 [B, 3, H, W] to float32 [B, 3, size, size] in [-1, 1].

    Bilinear with antialiasing, not rounded to 8 bits afterwards: both are known to shift Fréchet distances
    (Parmar et al. 2022).
    """
    assert images.dtype == torch.uint8, f"images are uint8, not {images.dtype}"
    pixels = images.float() / 127.5 - 1
    return F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=True)
