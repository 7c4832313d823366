"""The Inception score (Salimans et al. 2016) from sums over images, so that workers can share a set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SPLIT_IMAGES = 5_000
"""Number of consecutive images of one split; the metric is the mean over the splits (ADM's evaluation)."""


@dataclass
class ClassSums:
    """Sums over the class probabilities p of a split's images, from which its score follows.

    Args:
        count: number of images.
        total: sum of p [C], float64.
        negative_entropy: sum of Σ p ln p, float64 [].
    """

    count: int
    total: Tensor
    negative_entropy: Tensor

    @classmethod
    def empty(cls, classes: int, device: torch.device | str = "cpu") -> "ClassSums":
        """Sums over an empty split."""
        zeros = torch.zeros(classes, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros.sum())

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "ClassSums":
        """The inverse of :meth:`tensors`."""
        return cls(int(tensors["count"]), tensors["total"], tensors["negative_entropy"])

    def tensors(self) -> dict[str, Tensor]:
        """Tensors to store: ``count`` (int64), ``total`` and ``negative_entropy``."""
        count = torch.tensor(self.count, dtype=torch.int64)
        return {"count": count, "total": self.total, "negative_entropy": self.negative_entropy}

    def update(self, logits: Tensor) -> None:
        """Take in the logits [B, C] of some images."""
        logarithms = logits.to(self.total).log_softmax(dim=1)
        probabilities = logarithms.exp()
        self.count += len(logits)
        self.total = self.total + probabilities.sum(0)
        self.negative_entropy = self.negative_entropy + (probabilities * logarithms).sum()

    def score(self) -> float:
        """Score of the split, from 1 to C: exp of the mean Kullback-Leibler divergence of p from its mean."""
        assert self.count > 0, "no images, no score"
        mean = self.total / self.count
        return (self.negative_entropy / self.count - torch.special.xlogy(mean, mean).sum()).exp().item()


def inception_score(splits: Sequence[ClassSums]) -> float:
    """Mean score over the splits of a set."""
    return sum(split.score() for split in splits) / len(splits)
