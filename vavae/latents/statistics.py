"""Exact mean and standard deviation of latents per channel or position, and the normalization by them.

They are summed in float64 and stored beside the latents; the diffusion model learns latents that they normalize.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from safetensors.torch import load_file
from torch import Tensor, nn

from vavae.errors import UserError
from vavae.finite import require_finite
from vavae.storage.artifact import FileInfo
from vavae.storage.storage import Storage

STATISTICS = "statistics.safetensors"
"""File of the statistics in a folder of latents, and in the export of a tokenizer that came with some."""
_POSITION_EPSILON = 1e-5
"""Added to the variance at a position, which may be the same in all images (released code of RAEv2)."""


class LatentStatistics:
    """Exact mean and standard deviation, per channel or per position and channel, of latents drawn from posteriors.

    Sums in float64 over all images, and over all positions where they are of channels: E z = E μ and
    Var z = E (μ² + σ²) − (E μ)². Partial sums merge by addition.

    Args:
        shape: C for sums of channels, or (C, H, W) for sums of positions.
    """

    def __init__(self, shape: int | Sequence[int]) -> None:
        self.count = 0
        self.sum = np.zeros(shape)
        self.sum_squares = np.zeros(shape)

    def update(self, mean: np.ndarray, std: np.ndarray | None) -> None:
        """Add posteriors, mean and standard deviation [N, C, H, W] each, or points, which have no deviation."""
        mean = mean.astype(np.float64)
        squares = mean**2 if std is None else mean**2 + std.astype(np.float64) ** 2
        axes = (0, 2, 3) if self.sum.ndim == 1 else (0,)
        self.count += mean.size // self.sum.size
        self.sum += mean.sum(axes)
        self.sum_squares += squares.sum(axes)

    def merge(self, other: "LatentStatistics") -> None:
        """Add the sums of other latents."""
        self.count += other.count
        self.sum += other.sum
        self.sum_squares += other.sum_squares

    @property
    def mean(self) -> np.ndarray:
        """Mean, float64 [C] or [C, H, W]."""
        return self.sum / self.count

    @property
    def std(self) -> np.ndarray:
        """Standard deviation, float64 [C], or √(variance + ε) [C, H, W]."""
        variance = self.sum_squares / self.count - self.mean**2
        return np.sqrt(variance if self.sum.ndim == 1 else np.maximum(variance, 0) + _POSITION_EPSILON)

    def to_json(self) -> dict[str, object]:
        """The sums as plain values; floats survive JSON exactly."""
        return {"count": self.count, "sum": self.sum.tolist(), "sum_squares": self.sum_squares.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, object]) -> "LatentStatistics":
        """Restore sums from `to_json`."""
        statistics = cls(())
        statistics.count = int(values["count"])  # type: ignore[call-overload]
        statistics.sum, statistics.sum_squares = np.array(values["sum"]), np.array(values["sum_squares"])
        return statistics

    def write(self, storage: Storage, path: str) -> FileInfo:
        """Write the sums to a file: of positions they are too many for JSON. Returns its size and checksum."""
        data = save({"count": np.array(self.count), "sum": self.sum, "sum_squares": self.sum_squares})
        storage.write_bytes(path, data)
        return FileInfo(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    @classmethod
    def read(cls, storage: Storage, path: str, info: FileInfo) -> "LatentStatistics":
        """Restore sums from `write`; UserError where the file is another one than its checksum says."""
        data = storage.read_bytes(path)
        if hashlib.sha256(data).hexdigest() != info.sha256:
            raise UserError(f"{storage.url(path)}: damaged; delete it, and run precompute_latents again")
        values = load(data)
        statistics = cls(())
        statistics.count = int(values["count"])
        statistics.sum, statistics.sum_squares = values["sum"], values["sum_squares"]
        return statistics


def read_statistics(storage: Storage) -> tuple[Tensor, Tensor]:
    """Read mean and standard deviation, float64 [C] or [C, H, W] each, of the training split, from a folder of latents.

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
        mean: mean per channel [C], or per position and channel [C, H, W].
        std: standard deviation likewise.
        place: where they are from, for the error.

    Raises:
        UserError: one of them is not finite, or a deviation not above 0.
    """
    remedy = "these are no statistics of latents; compute the latents again, of a tokenizer whose channels all vary"
    require_finite({"mean": mean, "std": std}, place, remedy)
    dead = (std.float() <= 0).nonzero().tolist()  # as float32, in which latents are normalized
    if dead:
        index = ", ".join(map(str, dead[0]))
        raise UserError(f"{place}: std[{index}] is {std[tuple(dead[0])].item():g}, expected more than 0: {remedy}")


class LatentNormalizer(nn.Module):
    """Whiten latents per channel, or per position and channel: the model's latent is (z - mean) / std.

    Args:
        mean: mean [C] or [C, h, w] of the latents of the training set.
        std: standard deviation likewise, positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        assert mean.shape == std.shape, f"one mean and std each: {mean.shape}, {std.shape}"
        assert mean.ndim in (1, 3), f"statistics of channels or of positions: {mean.shape}"
        assert (std > 0).all(), "a channel of the latents does not vary"
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())

    @property
    def statistics(self) -> Literal["channel", "position"]:
        """Kind of these statistics, per channel or per position, as in `latents.statistics`."""
        return "channel" if self.mean.ndim == 1 else "position"

    def normalize(self, z: Tensor) -> Tensor:
        """Latents [B, C, h, w] of the tokenizer -> zero mean and unit deviation, same shape."""
        return (z - self._over_positions(self.mean)) / self._over_positions(self.std)

    def denormalize(self, z: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`."""
        return z * self._over_positions(self.std) + self._over_positions(self.mean)

    def _over_positions(self, statistic: Tensor) -> Tensor:
        return statistic if statistic.ndim == 3 else statistic[:, None, None]
