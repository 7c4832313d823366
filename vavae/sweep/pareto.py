"""Pareto front of points, and speed-up of one training over another."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np


def pareto_front(values: Sequence[Sequence[float]]) -> list[bool]:
    """Tell of each point whether it is on the Pareto front: no other is as low everywhere and lower somewhere.

    Equal points are on it together; a point with a value that is not a number is not.

    Args:
        values: [N, M]: N points, M objectives; lower is better.
    """
    if not values:
        return []
    found = np.array(values, dtype=float)
    known = np.isfinite(found).all(1)
    # [N, N]: [i, j] compares point i with point j
    no_worse = (found[:, None] <= found[None]).all(2)
    better = (found[:, None] < found[None]).any(2)
    dominated = (no_worse & better & known[:, None]).any(0)
    return [bool(on) for on in known & ~dominated]


class SpeedUp(NamedTuple):
    """Speed-up of a fast training in reaching the last value of a slow one."""

    ratio: float
    """Images seen by the slow one over images seen by the fast one."""
    at_least: bool
    """True where the fast one is as good at its first rung already."""


def speed_up(slow: Mapping[int, float], fast: Mapping[int, float]) -> SpeedUp | None:
    """Compare two curves of a falling metric by the last value of the slow one.

    Between two rungs the metric is interpolated linearly in the logarithm of the images.

    Args:
        slow: metric by images seen.
        fast: metric by images seen.

    Returns:
        The speed-up, below 1 where the fast one is slower in truth; None where it never reaches that value.
    """
    end = max(slow)
    goal, curve = slow[end], sorted(fast.items())
    if curve[0][1] <= goal:
        return SpeedUp(end / curve[0][0], at_least=True)
    for (before, high), (after, low) in pairwise(curve):
        if low <= goal < high:
            share = (high - goal) / (high - low)
            return SpeedUp(end / (before * (after / before) ** share), at_least=False)
    return None
