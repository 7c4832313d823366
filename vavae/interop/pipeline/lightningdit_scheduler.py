"""Euler's and Heun's method on the linear path from noise to data, as a scheduler of diffusers."""

import os
import shutil
from itertools import pairwise
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor


class LinearPathScheduler(SchedulerMixin, ConfigMixin):
    """A grid of times on the path (1 - σ) · data + σ · noise, and steps along it.

    Conventions are those of `FlowMatchEulerDiscreteScheduler`, which takes this configuration: σ runs from 1 to 0, a
    timestep is σ · num_train_timesteps, the model's output is noise - data, and evenly spaced σ become
    s σ / (1 + (s - 1) σ). Timesteps are float64 on the CPU, so that times 1 - σ are exactly those of a grid of times.

    Args:
        num_train_timesteps: timestep at which there is noise alone.
        shift: s.
        solver: `euler`, or `heun`, which evaluates the model at both ends of a step.
        ends_by_euler: take Heun's last step by Euler's method, for a model that has no velocity at σ = 0.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        solver: str = "euler",
        ends_by_euler: bool = False,
    ) -> None:
        self.order = {"euler": 1, "heun": 2}[solver]
        self.init_noise_sigma = 1.0

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the grid of so many steps; a step of Heun's has two timesteps. The device is of no account."""
        factor, even = 1 / self.config.shift, torch.linspace(0, 1, num_inference_steps + 1)
        times = (factor * even / (1 + (factor - 1) * even)).tolist()
        evaluated = times[:-1]
        if self.order == 2:
            evaluated = [time for ends in pairwise(times) for time in ends]
            evaluated = evaluated[: -1 if self.config.ends_by_euler else None]
        self.num_inference_steps = num_inference_steps
        self.timesteps = self.config.num_train_timesteps * (1 - torch.tensor(evaluated, dtype=torch.float64))
        self._steps = [*pairwise(times)]
        self._evaluations = 0
        self._start: Tensor | None = None
        self._velocity: Tensor | None = None

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Go on by one evaluation of the model; timesteps come in their order.

        Args:
            model_output: noise - data [B, C, H, W], as the model sees it at the sample.
            timestep: the timestep, which is not looked at.
            sample: latents [B, C, H, W].
            return_dict: give an output of diffusers, whose `prev_sample` [B, C, H, W] is next; else a tuple of it.
        """
        step, at_end = divmod(self._evaluations, self.order)
        t, t_next = self._steps[step]
        velocity = -model_output
        if at_end:
            assert self._start is not None, "a step's first evaluation comes before its second"
            assert self._velocity is not None, "likewise"
            moved = self._start + (t_next - t) * (self._velocity + velocity) / 2
        else:
            self._start, self._velocity = sample, velocity
            moved = sample + (t_next - t) * velocity
        self._evaluations += 1
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration, and this file beside it, without which nobody could load the scheduler."""
        super().save_config(save_directory, push_to_hub, **kwargs)
        shutil.copy(__file__, save_directory)
