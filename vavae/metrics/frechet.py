"""The Fréchet distance between two sets of features (Heusel et al. 2017, equation 6), from float64 running sums."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vavae.finite import require_finite


class Moments(Protocol):
    """Mean and covariance of a set of features, which the distance compares."""

    @property
    def mean(self) -> Tensor:
        """Mean [D], float64."""

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D], float64."""


@dataclass(frozen=True)
class Gaussian:
    """Published moments, of an unknown number of features: mean [D] and covariance [D, D], float64."""

    mean: Tensor
    covariance: Tensor


@dataclass
class FeatureStatistics:
    """Sums over features; sums of parts add up to the sums of the whole, to rounding in float64.

    Args:
        count: number of features n.
        total: their sum [D], float64.
        outer: sum of their outer products x xᵀ [D, D], float64.
    """

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def empty(cls, dimensions: int, device: torch.device | str = "cpu") -> "FeatureStatistics":
        """Statistics of an empty set."""
        zeros = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)
        return cls(0, zeros[0].clone(), zeros)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "FeatureStatistics":
        """The inverse of :meth:`tensors`."""
        return cls(int(tensors["count"]), tensors["total"], tensors["outer"])

    def tensors(self) -> dict[str, Tensor]:
        """Tensors to store or to sum over ranks: ``count`` (int64), ``total`` and ``outer``."""
        count = torch.tensor(self.count, dtype=torch.int64, device=self.total.device)
        return {"count": count, "total": self.total, "outer": self.outer}

    def update(self, features: Tensor) -> None:
        """Take in features [B, D] of any floating type."""
        assert features.shape[1:] == self.total.shape, f"{tuple(features.shape)} into {self.dimensions} dimensions"
        features = features.to(self.total)
        self.count += len(features)
        self.total = self.total + features.sum(0)
        self.outer = self.outer.addmm(features.T, features)

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """The statistics of both sets together."""
        return FeatureStatistics(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def dimensions(self) -> int:
        """Length D of a feature vector."""
        return len(self.total)

    @property
    def mean(self) -> Tensor:
        """Mean [D], float64."""
        assert self.count > 0, "no features, no mean"
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D], float64."""
        assert self.count > 1, f"no covariance of {self.count} features"
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)

    @property
    def is_singular(self) -> bool:
        """Return whether features are too few for a covariance of full rank.

        The distance is defined then, but strongly biased upwards.
        """
        return self.count <= self.dimensions


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½), at least 0.

    The trace of (Σ_a Σ_b)^½ equals that of (Σ_a^½ Σ_b Σ_a^½)^½, whose inner matrix is symmetric: eigenvalues in
    float64 do, where the square root of a non-symmetric matrix may turn complex. Singular covariances are no exception.

    Raises:
        UserError: a value of the moments is not finite.
    """
    assert len(a.mean) == len(b.mean), f"features of {len(a.mean)} and {len(b.mean)} dimensions"
    first, second = a.covariance, b.covariance
    for moments in ((a.mean, first), (b.mean, second)):
        named = dict(zip(("mean", "covariance"), moments, strict=True))
        require_finite(named, "moments of features", "no Fréchet distance of these; make the features again")
    root = _square_root(first)
    cross = _eigenvalues(root @ second @ root).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2 * cross
    return max(0.0, distance.item())


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * _without_rounding(values).sqrt()) @ vectors.T


def _eigenvalues(matrix: Tensor) -> Tensor:
    return _without_rounding(torch.linalg.eigvalsh((matrix + matrix.T) / 2))


def _without_rounding(values: Tensor) -> Tensor:
    """Set eigenvalues to zero that cannot be told from it, negative ones too: their roots would add up."""
    threshold = values.amax() * len(values) * torch.finfo(values.dtype).eps
    return values.where(values > threshold, 0.0)
