"""Integration of dx/dt = velocity(x, t). Time runs from noise (t = 0) to data (t = 1)."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from vavae.diffusion.config import SolverConfig

Velocity = Callable[[Tensor, float], Tensor]
"""velocity(x [B, C, H, W], t) -> [B, C, H, W]."""


def time_grid(config: SolverConfig) -> Tensor:
    """The num_steps + 1 times from 0 to 1, float32, moved by t' = s t / (1 + (s - 1) t).

    It is the shift of SD3 (arXiv 2403.03206, equation 23), whose time runs the other way, with 1 / s for its factor.
    """
    t = torch.linspace(0, 1, config.num_steps + 1)
    return config.shift * t / (1 + (config.shift - 1) * t)


def euler_step(velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
    """x at t_next by the velocity at t: first order, one evaluation."""
    return x + (t_next - t) * velocity(x, t)


def heun_step(velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
    """x at t_next by the mean of the velocities at t and where Euler's step ends: second order, two evaluations."""
    start = velocity(x, t)
    end = velocity(x + (t_next - t) * start, t_next)
    return x + (t_next - t) * (start + end) / 2


@torch.no_grad()
def solve(velocity: Velocity, noise: Tensor, config: SolverConfig) -> Tensor:
    """Data [B, C, H, W] from unit Gaussian noise of that shape. Takes no gradient, keeps no trajectory."""
    step = {"euler": euler_step, "heun": heun_step}[config.name]
    x = noise
    for t, t_next in pairwise(time_grid(config).tolist()):
        x = step(velocity, x, t, t_next)
    return x
