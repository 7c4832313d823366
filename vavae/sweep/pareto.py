"""Which trials no other one beats, and how much sooner one arrives where another ends."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np


def pareto_front(values: Sequence[Sequence[float]]) -> list[bool]:
    """Whether each point is on the front: no other is at least as low everywhere and lower somewhere.

    Equal points are on it together; a point with a value that is no number is not.

    Args:
        values: [N, M], of M objectives that are to be low.
    """
    if not values:
        return []
    found = np.array(values, dtype=float)
    known = np.isfinite(found).all(1)
    # [N, N]: whether the point of the column is dominated by that of the row.
    no_worse = (found[:, None] <= found[None]).all(2)
    better = (found[:, None] < found[None]).any(2)
    beaten = (no_worse & better & known[:, None]).any(0)
    return [bool(on) for on in known & ~beaten]


class SpeedUp(NamedTuple):
    """How much sooner a fast training reaches the last value of a slow one."""

    ratio: float
    """Images of the slow one over images of the fast one."""
    at_least: bool
    """Whether the fast one was there at its first measurement already."""


def speed_up(slow: Mapping[int, float], fast: Mapping[int, float]) -> SpeedUp | None:
    """Compare two curves of a measure that falls, by the last value of the slow one.

    Between two measurements the value is taken to be linear in the logarithm of the images.

    Args:
        slow: value by images seen.
        fast: likewise.

    Returns:
        The ratio, below 1 where the fast one is in truth slower; None where it never arrives.
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
