"""Normalization between the latents of the tokenizer and those of the diffusion model."""

from torch import Tensor, nn


class LatentNormalizer(nn.Module):
    """Whiten latents per channel: the model's latent is (z - mean) / std.

    Args:
        mean: mean [C] of the latents of the training set.
        std: standard deviation [C] likewise, positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        assert mean.shape == std.shape == (len(mean),), f"one mean and std per channel: {mean.shape}, {std.shape}"
        assert (std > 0).all(), "a channel of the latents does not vary"
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())

    def normalize(self, z: Tensor) -> Tensor:
        """Latents [B, C, h, w] of the tokenizer -> zero mean and unit deviation per channel, same shape."""
        return (z - self.mean[:, None, None]) / self.std[:, None, None]

    def denormalize(self, z: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`."""
        return z * self.std[:, None, None] + self.mean[:, None, None]
