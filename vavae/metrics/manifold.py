"""Improved precision and recall (Kynkäänniemi et al. 2019): which features lie in the other set's neighborhoods."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOR = 3
"""A feature's ball reaches to its third nearest neighbor (as published and in ADM's evaluation)."""
_ROWS = 1_024


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    """Of generated features inside a ball of a real one: how good they look."""
    recall: float
    """Of real features inside a ball of a generated one: how much of the real set is covered."""


def precision_recall(generated: Tensor, real: Tensor) -> PrecisionRecall:
    """Of features [N, D] and [M, D], more than three each; exact, with memory linear in N + M."""
    return PrecisionRecall(_covered(generated, real), _covered(real, generated))


def _covered(queries: Tensor, centres: Tensor) -> float:
    """Share of the queries that lie in the ball of any center."""
    assert len(centres) > NEIGHBOR, f"{len(centres)} features have no neighbour number {NEIGHBOR}"
    # A feature is the nearest to itself.
    radii = [rows.topk(NEIGHBOR + 1, largest=False).values[:, -1] for rows in _distances(centres, centres)]
    reach = torch.cat(radii)
    inside = [(rows <= reach).any(dim=1) for rows in _distances(queries, centres)]
    return torch.cat(inside).double().mean().item()


def _distances(queries: Tensor, centres: Tensor) -> Iterator[Tensor]:
    """Euclidean distances to all centers, some queries at a time."""
    return (torch.cdist(rows, centres) for rows in queries.split(_ROWS))
