"""The discriminator of StyleGAN-T and RAE: trained heads on the features of a frozen network.

Shapes: B images, C channels of a feature, N positions.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae.errors import UserError
from vavae.losses.config import FeatureDiscriminatorConfig
from vavae.models.backbones.color import as_color
from vavae.models.backbones.load import ImageNormalizer, LoadBackbone, freeze, load_backbone, meta_backbone

_NORM_EPSILON = 1e-6
_POWER_EPSILON = 1e-12


class FrozenFeatures(nn.Module):
    """The frozen network of a discriminator; gradients flow to the images.

    Args:
        config: the network and its layers.
        load: loads the network; another than `load_backbone` where its sizes alone matter.
    """

    def __init__(self, config: FeatureDiscriminatorConfig, load: LoadBackbone = load_backbone) -> None:
        super().__init__()
        self._config = config
        # Position embeddings are resampled where images have another size than in pretraining.
        resizes = hasattr(meta_backbone(config.backbone), "dynamic_img_size")
        self.model: Any = load(config.backbone, **({"dynamic_img_size": True} if resizes else {}))
        self.normalizer = ImageNormalizer.of(self.model)
        freeze(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features [B, C_i, N_i] of each configured layer, without final norm, of images [B, C, H, W] in [-1, 1]."""
        side, layers = self._config.image_size, self._config.layers
        images = F.interpolate(as_color(images), (side, side), mode="bilinear", align_corners=False)
        indices = sorted({*layers})
        found = self.model.forward_intermediates(
            self.normalizer(images), indices=indices, norm=False, stop_early=True, intermediates_only=True
        )
        by_layer = dict(zip(indices, found, strict=True))
        return [by_layer[layer].flatten(2) for layer in layers]


@cache
def feature_dims(config: FeatureDiscriminatorConfig) -> list[int]:
    """Channels of the features of each configured layer, known without the network's weights.

    Raises:
        UserError: timm does not know the network, or it has no such layer.
    """
    model: Any = meta_backbone(config.backbone)
    levels = list(model.feature_info)
    if max(config.layers) >= len(levels):
        raise UserError(
            f"losses.adversarial.features.layers={[*config.layers]}, but {config.name} has {len(levels)}, counted from "
            "0: lower them"
        )
    return [levels[layer]["num_chs"] for layer in config.layers]


class SpectralConv1d(nn.Module):
    """Convolution along a line that is a circle, its weight divided by its largest singular value.

    That value is estimated by power iteration from vectors that are kept. A forward pass in training takes one
    iteration from them, as published, but keeps its vectors only when :meth:`advance` is called: so a step may have any
    number of passes, and each sees the same weight. Names are those of the public code.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        initial = nn.Conv1d(in_channels, out_channels, kernel)
        assert initial.bias is not None, "a convolution has a bias"
        self.weight_orig, self.bias = initial.weight, initial.bias
        for name, length in (("weight_u", out_channels), ("weight_v", in_channels * kernel)):
            self.register_buffer(name, F.normalize(torch.randn(length), dim=0, eps=_POWER_EPSILON))
        self._padding = kernel // 2
        self._next: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [B, C_in, N] -> [B, C_out, N]."""
        with torch.autocast(x.device.type, enabled=False):  # which would estimate in half precision
            matrix, u, v = self.weight_orig.flatten(1), self.weight_u, self.weight_v
            if self.training:
                with torch.no_grad():
                    v = F.normalize(matrix.t() @ u, dim=0, eps=_POWER_EPSILON)
                    u = F.normalize(matrix @ v, dim=0, eps=_POWER_EPSILON)
                self._next = (u, v)
            weight = self.weight_orig / (u @ (matrix @ v))
        if self._padding:
            x = F.pad(x, (self._padding, self._padding), mode="circular")
        return F.conv1d(x, weight, self.bias)

    @torch.no_grad()
    def advance(self) -> None:
        """Keep the vectors of the last forward pass in training."""
        if self._next is not None:
            self.weight_u.copy_(self._next[0])
            self.weight_v.copy_(self._next[1])


def advance_power_iterations(module: nn.Module) -> None:
    """Let every `SpectralConv1d` of a module keep the vectors of its last forward pass in training, once a step."""
    for layer in module.modules():
        if isinstance(layer, SpectralConv1d):
            layer.advance()


class PositionNorm(nn.Module):
    """Normalization of each channel of an image over its positions, with scale and shift: [B, C, N] -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [B, C, N], in float32."""
        x = x.float()
        variance, mean = torch.var_mean(x, dim=2, correction=0, keepdim=True)
        normalized = (x - mean) * torch.rsqrt(variance + _NORM_EPSILON)
        return normalized * self.weight[:, None] + self.bias[:, None]


class _Block(nn.Sequential):
    """Convolution, normalization and activation: [B, C, N] -> same."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__(SpectralConv1d(channels, channels, kernel), PositionNorm(channels), nn.LeakyReLU(0.2))


class _Residual(nn.Module):
    """(f(x) + x) / sqrt 2."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return (self.fn(x) + x) / math.sqrt(2)


class Head(nn.Sequential):
    """Trained part for one layer: features [B, C, N] -> one logit for each position, [B, 1, N]."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__(_Block(channels, 1), _Residual(_Block(channels, kernel)), SpectralConv1d(channels, 1, 1))


class FeatureDiscriminator(nn.Module):
    """Heads on features of several layers -> float32 logits, high for real images.

    Raises:
        UserError: see `feature_dims`.
    """

    def __init__(self, config: FeatureDiscriminatorConfig) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(channels, config.kernel) for channels in feature_dims(config))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits [B, sum of N_i], float32, of the features [B, C_i, N_i] that `FrozenFeatures` gives."""
        return torch.cat(
            [head(each).flatten(1) for head, each in zip(self.heads, features, strict=True)], dim=1
        ).float()
