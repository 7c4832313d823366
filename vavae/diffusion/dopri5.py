"""Adaptive integration by the pair of orders 5 and 4 of Dormand and Prince (1980), every image with steps of its own.

The size of a step is found as in Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, section II.4.
Measured over the whole batch, as by torchdiffeq, the error makes an image depend on the rest of its batch; here it is
measured for each image, and a batch is merely what the model evaluates at a time. Time runs from noise (t = 0) to data
(t = 1).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vavae.errors import UserError

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function velocity(x [B, C, H, W], t [B] on the CPU, y int64 [B]) -> dx/dt [B, C, H, W], each at its own time."""

_STAGES = (
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1.0, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1.0, (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
"""Time of a stage in steps, and the weights of the slopes before it. The last is the solution of fifth order itself."""
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""Weights of the slopes in the error estimate: fifth order less fourth."""

_ERROR_EXPONENT = 1 / 5
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0


class Tolerance(NamedTuple):
    """Tolerated error of a step: absolute + relative · |x|."""

    relative: float
    absolute: float

    def norm(self, error: Tensor, magnitude: Tensor) -> Tensor:
        """Root mean square over each image of error / tolerance, float64 [B] on the CPU; below 1 it is met."""
        return (error / (self.absolute + self.relative * magnitude)).double().square().flatten(1).mean(1).sqrt().cpu()


class _Trial(NamedTuple):
    """A step that may be rejected."""

    x: Tensor
    """End of the step, [B, C, H, W]."""
    slope: Tensor
    """Velocity at the end of the step, [B, C, H, W]."""
    error: Tensor
    """Estimated error of x, [B, C, H, W]."""


@torch.no_grad()
def dopri5(
    velocity: Velocity, noise: Tensor, labels: Tensor, tolerance: Tolerance, jumps: Sequence[float] = ()
) -> Tensor:
    """Integrate dx/dt = velocity from t = 0 to 1, every image with steps of its own.

    Args:
        velocity: velocity of every image at a time of its own.
        noise: start of each image, [B, C, H, W].
        labels: int64 [B], given to the velocity as they are.
        tolerance: for the root mean square error of an image in a step.
        jumps: times in between, ascending, at which the velocity is not continuous: no step goes across them.

    Returns:
        End of each image, [B, C, H, W].

    Raises:
        UserError: the velocity is not finite, or can't be followed in the precision of the noise.
    """
    x = noise
    for start, end in pairwise([0.0, *jumps, 1.0]):
        x = _integrate(_between(velocity, start, end, x.dtype), x, labels, start, end, tolerance)
    return x


def _between(velocity: Velocity, start: float, end: float, dtype: torch.dtype) -> Velocity:
    """Restrict a velocity to the side of the jumps at both ends that lies between them."""
    first, last = (
        bound if bound in (0, 1) else torch.tensor(bound, dtype=dtype).nextafter(torch.tensor(inside, dtype=dtype))
        for bound, inside in ((start, 1.0), (end, 0.0))
    )
    return lambda x, t, y: velocity(x, t.to(dtype).clamp(float(first), float(last)), y)


def _integrate(
    velocity: Velocity, start_x: Tensor, labels: Tensor, start: float, end: float, tolerance: Tolerance
) -> Tensor:
    """Integrate a smooth velocity from one time to another."""
    x, t = start_x.clone(), torch.full((len(start_x),), start, dtype=torch.float64)
    smallest = min(10 * torch.finfo(x.dtype).eps, end - start)
    slope = velocity(x, t, labels).clone()  # its rows are replaced
    step = _first_step(velocity, x, slope, labels, t, tolerance).clamp(smallest, end - start)
    retried = torch.zeros(len(x), dtype=torch.bool)
    rows = torch.arange(len(x))  # of the images that are still under way
    while len(rows):
        _check(step[rows] >= smallest, t[rows])
        t_next = (t[rows] + step[rows]).clamp(max=end)
        h = t_next - t[rows]
        trial = _try(velocity, x[rows], slope[rows], labels[rows], t[rows], h)
        error = tolerance.norm(trial.error, torch.maximum(x[rows].abs(), trial.x.abs()))
        good = error < 1
        factor = (_SAFETY * error**-_ERROR_EXPONENT).clamp(_SHRINK, _GROW).nan_to_num(_SHRINK)
        step[rows] = h * torch.where(good & retried[rows], factor.clamp(max=1), factor)
        retried[rows] = ~good
        moved = rows[good]
        x[moved], slope[moved], t[moved] = trial.x[good], trial.slope[good], t_next[good]
        rows = rows[t[rows] < end]
    return x


def _try(velocity: Velocity, x: Tensor, slope: Tensor, labels: Tensor, t: Tensor, h: Tensor) -> _Trial:
    """Try steps of h [B] from x at t [B], where the velocity is `slope`; six evaluations."""
    slopes, point, width = [slope], x, h.to(x).view(-1, 1, 1, 1)
    for time, weights in _STAGES:
        point = x + width * _combine(weights, slopes)
        slopes.append(velocity(point, t + time * h, labels))
    return _Trial(point, slopes[-1], width * _combine(_ERROR, slopes))


def _combine(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        total = total + weight * slope
    return total


def _first_step(
    velocity: Velocity, x: Tensor, slope: Tensor, labels: Tensor, t: Tensor, tolerance: Tolerance
) -> Tensor:
    """Sizes [B] of the first step (Hairer et al., algorithm 4.14); one evaluation."""
    size, speed = (tolerance.norm(of, x.abs()) for of in (x, slope))
    h = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).clamp(max=1)
    slope_ahead = velocity(x + h.to(x).view(-1, 1, 1, 1) * slope, t + h, labels)
    bend = tolerance.norm(slope_ahead - slope, x.abs()) / h
    steepest = torch.maximum(speed, bend)
    better = torch.where(steepest <= 1e-15, (h * 1e-3).clamp(min=1e-6), (0.01 / steepest) ** _ERROR_EXPONENT)
    return torch.minimum(100 * h, better)


def _check(possible: Tensor, t: Tensor) -> None:
    """Raise UserError where no possible step would move t [B]; NaN allows none."""
    if not possible.all():
        raise UserError(
            f"solver.name=dopri5 finds no step at t={t[~possible][0].item():.6f}: the velocity is not finite there, or "
            "changes too fast for solver.rtol; raise it, or take heun"
        )
