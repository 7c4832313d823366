"""Solvers of dx/dt = velocity(x, t, y). Time runs from noise (t = 0) to data (t = 1)."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vavae.diffusion.config import SolverConfig
from vavae.diffusion.dopri5 import Tolerance, Velocity, dopri5
from vavae.diffusion.mean_flow import AverageVelocity
from vavae.diffusion.shift import shift_times
from vavae.errors import UserError

CommonTimeVelocity = Callable[[Tensor, float], Tensor]
"""Function velocity(x [B, C, H, W], t) -> [B, C, H, W], all images at one time."""


def time_grid(config: SolverConfig, dimension: int) -> Tensor:
    """Grid of the num_steps + 1 times from 0 to 1, float32 [num_steps + 1], shifted."""
    return shift_times(torch.linspace(0, 1, config.num_steps + 1), config.shift, dimension)


def euler_step(velocity: CommonTimeVelocity, x: Tensor, t: float, t_next: float) -> Tensor:
    """Take an Euler step from x at t to t_next: first order, one evaluation."""
    return x + (t_next - t) * velocity(x, t)


def heun_step(velocity: CommonTimeVelocity, x: Tensor, t: float, t_next: float) -> Tensor:
    """Take a Heun step, by the mean velocity at t and at the Euler step's end: second order, two evaluations."""
    start = velocity(x, t)
    end = velocity(x + (t_next - t) * start, t_next)
    return x + (t_next - t) * (start + end) / 2


@torch.no_grad()
def solve_mean_flow(average_velocity: AverageVelocity, noise: Tensor, labels: Tensor, config: SolverConfig) -> Tensor:
    """Lead unit Gaussian noise [B, C, H, W] to data of that shape by the average velocity of each step of the grid.

    Args:
        average_velocity: the model; it gets times on the device of the noise.
        noise: unit Gaussian noise [B, C, H, W].
        labels: int64 [B].
        config: time grid.
    """
    x = noise
    for t, t_next in pairwise(time_grid(config, noise[0].numel()).tolist()):
        start, end = (torch.full((len(x),), time, device=x.device) for time in (t, t_next))
        x = x + (t_next - t) * average_velocity(x, start, labels, end)
    return x


@torch.no_grad()
def solve(
    velocity: Velocity,
    noise: Tensor,
    labels: Tensor,
    config: SolverConfig,
    jumps: Sequence[float] = (),
    *,
    ends_by_euler: bool = False,
    dimension: int | None = None,
) -> Tensor:
    """Integrate unit Gaussian noise [B, C, H, W] to data of that shape. Takes no gradient, keeps no trajectory.

    Args:
        velocity: the velocity, guided or not.
        noise: unit Gaussian noise [B, C, H, W].
        labels: int64 [B], given to the velocity as they are.
        config: solver and time grid.
        jumps: times between 0 and 1 at which the velocity is not continuous; a grid takes no notice of them.
        ends_by_euler: take the last step by Euler's method, because the velocity has no value at t = 1.
        dimension: numbers of a latent, by which the grid may be shifted; None: all that are integrated.

    Raises:
        UserError: `dopri5` can't go on (see there), or there is no velocity at t = 1, where it needs one.
    """
    if config.name == "dopri5" and ends_by_euler:
        raise UserError(
            "solver.name=dopri5 takes velocities at t = 1, where lightningdit.prediction=data has none: set euler or "
            "heun"
        )
    if config.name == "dopri5":
        return dopri5(velocity, noise, labels, Tolerance(config.rtol, config.atol), jumps)
    step = {"euler": euler_step, "heun": heun_step}[config.name]

    def velocity_at(x: Tensor, t: float) -> Tensor:
        return velocity(x, torch.full((len(x),), t), labels)

    x = noise
    *steps, last = pairwise(time_grid(config, dimension or noise[0].numel()).tolist())
    for t, t_next in steps:
        x = step(velocity_at, x, t, t_next)
    return (euler_step if ends_by_euler else step)(velocity_at, x, *last)
