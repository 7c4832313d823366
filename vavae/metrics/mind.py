"""The distance MIND of two sets of features, from one-dimensional projections (arXiv 2605.06797)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vavae.metrics.config import MindConfig
from vavae.randomness import torch_generator

_SCALE = 3
_DIRECTIONS_AT_ONCE = 128


class Mind(NamedTuple):
    """The distance MIND and what it was computed of."""

    distance: float
    samples: int
    """Features of each set."""
    directions: int


def mind(a: Tensor, b: Tensor, config: MindConfig, *, seed: int) -> Mind:
    """The mean of 3 D (sorted projection of a - sorted projection of b)² over directions and ranks, in float64.

    The first features of both sets are taken, equally many. A shift by c gives 3 |c|² in expectation over the
    directions; Gaussians N(0, s²) and N(0, r²) give 3 D (s - r)² in the limit of many samples.

    Args:
        a: features of one set, [N, D].
        b: features of the other set, [M, D].
        config: numbers of directions and features.
        seed: keys the directions.
    """
    count, dimensions = min(config.samples, len(a), len(b)), a.shape[1]
    assert count > 0, f"no distance of {len(a)} and {len(b)} features"
    drawn = torch.randn(config.directions, dimensions, dtype=torch.float64, generator=torch_generator(seed, "mind"))
    directions = F.normalize(drawn, dim=1).to(a.device)
    first, second = a[:count].double(), b[:count].double()
    sums = [
        ((first @ some.T).sort(dim=0).values - (second @ some.T).sort(dim=0).values).square().sum()
        for some in directions.split(_DIRECTIONS_AT_ONCE)
    ]
    mean = torch.stack(sums).sum().item() / (count * config.directions)
    return Mind(_SCALE * dimensions * mean, count, config.directions)
