"""The discriminators, and the losses on both sides of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae.losses.config import NORM_GROUPS, AdversarialLossConfig
from vavae.losses.feature_discriminator import FeatureDiscriminator

_MAX_MULTIPLIER = 8
_INIT_STD = 0.02


class PatchDiscriminator(nn.Module):
    """PatchGAN, arXiv 1611.07004: images [B, C, H, W] in [-1, 1] -> float32 logits [B, 1, h, w], high for real images.

    Parameters are named and initialized as in the released code (``main.N``). The norm `sync_batch` is built as a plain
    batch normalization, which `sync_batch_norm` extends over the ranks.
    """

    def __init__(self, config: AdversarialLossConfig, image_channels: int = 3) -> None:
        super().__init__()
        multipliers = [min(2**layer, _MAX_MULTIPLIER) for layer in range(config.layers + 1)]
        widths = [config.channels * multiplier for multiplier in multipliers]
        first = nn.Conv2d(image_channels, widths[0], kernel_size=4, stride=2, padding=1)
        modules: list[nn.Module] = [first, nn.LeakyReLU(0.2)]
        for index in range(1, len(widths)):
            stride = 2 if index < config.layers else 1
            modules += [
                # A batch norm's shift makes the bias redundant.
                nn.Conv2d(
                    widths[index - 1],
                    widths[index],
                    kernel_size=4,
                    stride=stride,
                    padding=1,
                    bias=config.norm == "group",
                ),
                nn.GroupNorm(NORM_GROUPS, widths[index]) if config.norm == "group" else nn.BatchNorm2d(widths[index]),
                nn.LeakyReLU(0.2),
            ]
        modules.append(nn.Conv2d(widths[-1], 1, kernel_size=4, stride=1, padding=1))
        self.main = nn.Sequential(*modules)
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 [B, 1, h, w], one per overlapping patch, of images [B, C, H, W] in [-1, 1]."""
        return self.main(images.to(next(self.parameters()).dtype)).float()


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, _INIT_STD)
    elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
        nn.init.normal_(module.weight, 1.0, _INIT_STD)
        nn.init.zeros_(module.bias)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator: ½ (mean ReLU(1 - real) + mean ReLU(1 + fake)), logits of any shape -> scalar."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def vanilla(real: Tensor, fake: Tensor) -> Tensor:
    """Logistic loss of the discriminator: ½ (mean softplus(-real) + mean softplus(fake)), any shape -> scalar."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"hinge": hinge, "vanilla": vanilla}
"""Losses of the discriminator, (real, fake logits) -> scalar, by their names in the configuration."""


def generator_loss(fake: Tensor) -> Tensor:
    """Loss of the generator: the negative mean logit of its images, scalar."""
    return -fake.mean()


class DiscriminatorTerms(NamedTuple):
    """Losses and logits of the discriminator, scalars; only ``objective`` is meant to be differentiated."""

    objective: Tensor
    """Loss that the discriminator minimizes."""
    real: Tensor
    """Mean logit of real images, detached."""
    fake: Tensor
    """Mean logit of reconstructions, detached."""
    right: Tensor
    """Logits of the right sign, above zero for real images and below for reconstructions, and all logits: [2]."""


def build_discriminator(config: AdversarialLossConfig, image_channels: int = 3) -> nn.Module:
    """Build what is trained of a discriminator: a map to logits, of images or of the features of the frozen network.

    Raises:
        UserError: timm does not know the network, or it has no such layer.
    """
    if config.kind == "features":
        return FeatureDiscriminator(config.features)
    return PatchDiscriminator(config, image_channels)


View = Callable[[Tensor], Any]
"""Function of images [B, C, H, W] in [-1, 1] -> what the discriminator takes of them."""


class DiscriminatorObjective(nn.Module):
    """The discriminator's step in one forward, so that an engine can wrap it whole."""

    def __init__(self, config: AdversarialLossConfig, image_channels: int = 3) -> None:
        super().__init__()
        self.discriminator = build_discriminator(config, image_channels)
        self._loss, self._rounds = DISCRIMINATOR_LOSSES[config.loss], config.kind == "features"

    def forward(
        self, images: Tensor, reconstruction: Tensor, views: tuple[View, View] | None = None
    ) -> DiscriminatorTerms:
        """Compare images and reconstructions, both [B, C, H, W] in [-1, 1]; the reconstructions are detached.

        Each of the two has batch statistics of its own. On frozen features reconstructions are seen in 8 bits (RAE).

        Args:
            images: real images.
            reconstruction: what the generator made of them.
            views: of images and of reconstructions; None shows both as they are.
        """
        reconstruction = reconstruction.detach()
        if self._rounds:
            reconstruction = ((reconstruction.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        seen = (images, reconstruction) if views is None else (views[0](images), views[1](reconstruction))
        real, fake = (self.discriminator(each) for each in seen)
        signs = torch.stack([real > 0, fake < 0])
        right = torch.stack([signs, torch.ones_like(signs)]).flatten(1).sum(1)
        return DiscriminatorTerms(self._loss(real, fake), real.mean().detach(), fake.mean().detach(), right)
