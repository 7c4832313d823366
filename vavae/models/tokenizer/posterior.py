"""The posterior q(z | x) of the autoencoder: a Gaussian with a diagonal covariance."""

from dataclasses import dataclass

import torch
from torch import Tensor

_LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent Gaussians over [B, C, h, w], in nats and latent units.

    Args:
        mean: [B, C, h, w].
        logvar: logarithm of the variance, same shape; clamped to the range of the released code.
    """

    mean: Tensor
    logvar: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "logvar", self.logvar.clamp(*_LOG_VARIANCE_RANGE))

    @property
    def std(self) -> Tensor:
        """Standard deviation, [B, C, h, w]."""
        return torch.exp(0.5 * self.logvar)

    @property
    def mode(self) -> Tensor:
        """The most likely latent, [B, C, h, w]."""
        return self.mean

    def at(self, noise: Tensor) -> Tensor:
        """The latent mean + std · noise; standard normal noise makes it a sample that gradients flow through."""
        return self.mean + self.std * noise

    def sample(self, rng: torch.Generator) -> Tensor:
        """One sample per position, [B, C, h, w], drawn from an rng of the same device."""
        noise = torch.randn(self.mean.shape, generator=rng, device=self.mean.device, dtype=self.mean.dtype)
        return self.at(noise)

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, ½ Σ (μ² + σ² - 1 - log σ²) over C, h, w: [B], in nats."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))
