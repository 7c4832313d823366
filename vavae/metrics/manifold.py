"""Improved precision and recall (Kynkäänniemi et al. 2019): which features lie in the other set's neighborhoods."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOR = 3
"""Rank of the neighbor that a feature's ball reaches to (as published and in ADM's evaluation)."""
_ROWS = 1_024


class PrecisionRecall(NamedTuple):
    """Precision and recall, shares in [0, 1]."""

    precision: float
    """Share of generated features inside a ball of a real one: how good they look."""
    recall: float
    """Share of real features inside a ball of a generated one: how much of the real set is covered."""


def precision_recall(generated: Tensor, real: Tensor) -> PrecisionRecall:
    """Precision and recall of features [N, D] and [M, D], more than three each; exact, in memory linear in N + M."""
    return PrecisionRecall(_covered(generated, real), _covered(real, generated))


def _covered(queries: Tensor, centers: Tensor) -> float:
    """Share of the queries that lie in the ball of any center."""
    assert len(centers) > NEIGHBOR, f"{len(centers)} features have no neighbor number {NEIGHBOR}"
    # A feature is the nearest to itself.
    radii = [rows.topk(NEIGHBOR + 1, largest=False).values[:, -1] for rows in _distances(centers, centers)]
    reach = torch.cat(radii)
    inside = [(rows <= reach).any(dim=1) for rows in _distances(queries, centers)]
    return torch.cat(inside).double().mean().item()


def _distances(queries: Tensor, centers: Tensor) -> Iterator[Tensor]:
    """Euclidean distances to all centers, some queries at a time."""
    return (torch.cdist(rows, centers) for rows in queries.split(_ROWS))
