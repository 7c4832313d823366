"""Perceptual distances between images: LPIPS, and a distance of any network's features."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vavae.losses.config import PerceptualLossConfig
from vavae.models.backbones.color import as_color
from vavae.models.backbones.load import LoadBackbone, freeze, load_backbone

Features = Callable[[Tensor], Sequence[Tensor]]
"""Function of images [B, 3, H, W] in [-1, 1] -> feature maps [B, C_i, H_i, W_i]."""
Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Function of two batches of images [B, 3, H, W] in [-1, 1] -> distance per image [B]."""

_EPSILON = 1e-8
# Last activation of each of the five resolutions in the sequence of VGG16's layers.
_VGG_OUTPUTS = (3, 8, 15, 22, 29)
# ImageNet statistics for images in [-1, 1] (LPIPS, released code).
_LPIPS_MEAN = (-0.030, -0.088, -0.188)
_LPIPS_STD = (0.458, 0.448, 0.450)


def build_perceptual(
    config: PerceptualLossConfig, teacher_features: Features, load: LoadBackbone = load_backbone
) -> nn.Module | None:
    """Build the perceptual distance of a configuration; None where it is switched off.

    Args:
        config: the kind of distance and its weights.
        teacher_features: early features of the teacher; used by the kind `teacher_features` alone.
        load: loads VGG16; another than `load_backbone` where its sizes alone matter.

    Raises:
        UserError: the weights of VGG16 cannot be had.
    """
    if config.kind == "none" or config.weight == 0:
        return None
    return LPIPS.load(config, load) if config.kind == "lpips" else TeacherFeatureDistance(teacher_features)


def squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Squared difference of two feature maps after each position is scaled to unit length: [B, C, H, W] -> float32."""
    return (_unit(first.float()) - _unit(second.float())).square()


def _unit(features: Tensor) -> Tensor:
    # Inside the root: the gradient at a position without any activation is zero, not NaN.
    return features / torch.sqrt(features.square().sum(dim=1, keepdim=True) + _EPSILON)


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity on VGG16, arXiv 1801.03924, version 0.1; never with dropout.

    Args:
        layers: the layers of VGG16 before its classifier.
        heads: weight of each channel at each of the five resolutions, [C_i].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, layers: nn.Sequential, heads: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(list(layers)[: _VGG_OUTPUTS[-1] + 1])
        self.heads = nn.ParameterList(head.view(1, -1, 1, 1) for head in heads)
        self.register_buffer("mean", torch.tensor(_LPIPS_MEAN).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_LPIPS_STD).view(-1, 1, 1), persistent=False)
        freeze(self)

    @classmethod
    def load(cls, config: PerceptualLossConfig, load: LoadBackbone = load_backbone) -> "LPIPS":
        """Load the ImageNet weights of VGG16 and the published heads.

        Raises:
            UserError: the weights of VGG16 cannot be had.
        """
        vgg: Any = load(config.backbone)
        return cls(vgg.features, published_heads())

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Distances [B] of images [B, C, H, W] in [-1, 1]; gradients flow to both arguments."""
        pairs = zip(self.heads, self._features(images), self._features(reconstruction), strict=True)
        return torch.stack(
            [(head * squared_distances(first, second)).sum(dim=1).mean(dim=(1, 2)) for head, first, second in pairs]
        ).sum(dim=0)

    def _features(self, images: Tensor) -> list[Tensor]:
        x = (as_color(images) - self.mean) / self.std
        outputs = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in _VGG_OUTPUTS:
                outputs.append(x)
        return outputs


def published_heads() -> list[Tensor]:
    """Load the linear heads of LPIPS for VGG16, which torchmetrics ships: five tensors [C_i]."""
    spec = importlib.util.find_spec("torchmetrics")
    assert spec is not None and spec.submodule_search_locations, "torchmetrics is among the package's dependencies"  # noqa: PT018
    file = Path(spec.submodule_search_locations[0], "functional", "image", "lpips_models", "vgg.pth")
    state = torch.load(file, map_location="cpu", weights_only=True)
    return [state[f"lin{index}.model.1.weight"].flatten() for index in range(len(_VGG_OUTPUTS))]


class TeacherFeatureDistance(nn.Module):
    """A stand-in for LPIPS without its weights: the form of LPIPS on the early features of any network.

    Every channel counts alike and the resolutions are averaged, so its values are not comparable with LPIPS.

    Args:
        features: early feature maps of images; gradients flow to the images.
    """

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Distances [B], from 0 to 4, of images [B, 3, H, W] in [-1, 1]; gradients flow to both arguments."""
        pairs = zip(self.features(images), self.features(reconstruction), strict=True)
        return torch.stack(
            [squared_distances(first, second).sum(dim=1).mean(dim=(1, 2)) for first, second in pairs]
        ).mean(dim=0)
