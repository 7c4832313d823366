"""Exact mean and standard deviation of latents per channel, and the normalization by them.

They are summed in float64 and stored beside the latents; the diffusion model learns latents that they normalize.
"""

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vavae.errors import UserError
from vavae.finite import require_finite
from vavae.storage.storage import Storage

STATISTICS = "statistics.safetensors"
"""File of the statistics in a folder of latents, and in the export of a tokenizer that came with some."""


class LatentStatistics:
    """Exact mean and standard deviation per channel of latents drawn from their posteriors.

    Sums in float64 over all positions: E z = E μ and Var z = E (μ² + σ²) − (E μ)². Partial sums merge by addition.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sum = np.zeros(channels)
        self.sum_squares = np.zeros(channels)

    def update(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Add posteriors: mean and standard deviation, [N, C, H, W] each."""
        mean, std = mean.astype(np.float64), std.astype(np.float64)
        self.count += mean.size // mean.shape[1]
        self.sum += mean.sum((0, 2, 3))
        self.sum_squares += (mean**2 + std**2).sum((0, 2, 3))

    def merge(self, other: "LatentStatistics") -> None:
        """Add the sums of other latents."""
        self.count += other.count
        self.sum += other.sum
        self.sum_squares += other.sum_squares

    @property
    def mean(self) -> np.ndarray:
        """Mean per channel, float64 [C]."""
        return self.sum / self.count

    @property
    def std(self) -> np.ndarray:
        """Standard deviation per channel, float64 [C]."""
        return np.sqrt(self.sum_squares / self.count - self.mean**2)

    def to_json(self) -> dict[str, object]:
        """The sums as plain values; floats survive JSON exactly."""
        return {"count": self.count, "sum": self.sum.tolist(), "sum_squares": self.sum_squares.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, object]) -> "LatentStatistics":
        """Restore sums from `to_json`."""
        statistics = cls(0)
        statistics.count = int(values["count"])  # type: ignore[call-overload]
        statistics.sum, statistics.sum_squares = np.array(values["sum"]), np.array(values["sum_squares"])
        return statistics


def read_statistics(storage: Storage) -> tuple[Tensor, Tensor]:
    """Read mean and standard deviation, float64 [C] each, from a folder of latents: those of its training split.

    The export of a tokenizer that was imported with statistics of its latents holds them in the same form.

    Raises:
        UserError: they are not there, or none that latents can be normalized by.
    """
    try:
        tensors = load_file(storage.local_file(STATISTICS))
        mean, std = tensors["mean"], tensors["std"]
    except (FileNotFoundError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{storage.url(STATISTICS)}: no statistics of the latents there; run precompute_latents"
        ) from error
    check_statistics(mean, std, storage.url(STATISTICS))
    return mean, std


def check_statistics(mean: Tensor, std: Tensor, place: str) -> None:
    """Refuse statistics that latents can't be normalized by.

    Args:
        mean: mean per channel [C].
        std: standard deviation per channel [C].
        place: where they are from, for the error.

    Raises:
        UserError: one of them is not finite, or a deviation not above 0.
    """
    remedy = "these are no statistics of latents; compute the latents again, of a tokenizer whose channels all vary"
    require_finite({"mean": mean, "std": std}, place, remedy)
    dead = (std.float() <= 0).nonzero().flatten().tolist()  # as float32, in which latents are normalized
    if dead:
        channel = dead[0]
        raise UserError(f"{place}: std[{channel}] is {std[channel].item():g}, expected more than 0: {remedy}")


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
