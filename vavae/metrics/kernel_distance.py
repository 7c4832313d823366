"""The kernel distance between two sets of features, KID on those of Inception (Bińkowski et al. 2018)."""

from typing import NamedTuple

import torch
from torch import Tensor

import vavae.torchvision_compat  # noqa: F401  (before torchmetrics)

# isort: split
from torchmetrics.image.kid import poly_mmd

from vavae.randomness import torch_generator

SUBSETS, SUBSET_FEATURES = 100, 1_000
"""Published number of subsets, and of features drawn from both sets for each, without replacement."""


class KernelDistance(NamedTuple):
    """Squared maximum mean discrepancy under the kernel (x·y / D + 1)³, without bias, so it may fall below 0."""

    mean: float
    std: float
    """Standard deviation over the subsets."""
    subset: int
    """Number of features in one subset."""


def kernel_distance(
    a: Tensor, b: Tensor, *, seed: int, subsets: int = SUBSETS, subset_features: int = SUBSET_FEATURES
) -> KernelDistance:
    """Kernel distance of features [N, D] and [M, D], in float64; of smaller sets than a subset all are taken.

    Args:
        a: features of one set, [N, D].
        b: features of the other set, [M, D].
        seed: with the number of the subset it keys which features are drawn; their order in a set counts.
        subsets: number of subsets.
        subset_features: number of features in each.
    """
    size = min(subset_features, len(a), len(b))
    assert size > 1, f"no kernel distance of {len(a)} and {len(b)} features"
    distances = torch.stack([_subset_distance(a, b, size, seed, number) for number in range(subsets)])
    return KernelDistance(distances.mean().item(), distances.std(correction=0).item(), size)


def _subset_distance(a: Tensor, b: Tensor, size: int, seed: int, number: int) -> Tensor:
    rng = torch_generator(seed, "kernel distance", number)
    first, second = (features[torch.randperm(len(features), generator=rng)[:size]] for features in (a, b))
    return poly_mmd(first.double(), second.double())
