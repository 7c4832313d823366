"""Sampling of the timesteps that are trained on. Time runs from noise (t = 0) to data (t = 1)."""

import torch
from torch import Tensor

from vavae.diffusion.config import TimestepConfig


def sample_timesteps(config: TimestepConfig, batch_size: int, images_seen: int, rng: torch.Generator) -> Tensor:
    """Draw timesteps float32 [batch_size] in [0, 1], on the device of the rng.

    Logit-normal timesteps (SD3, arXiv 2403.03206, section 3.1) dwell in the middle of the path, where the
    velocity is hardest to predict; images_seen decides whether the law has been switched to uniform.
    """
    switched = config.uniform_after_images is not None and images_seen >= config.uniform_after_images
    if switched or config.law == "uniform":
        return torch.rand(batch_size, generator=rng, device=rng.device)
    normal = torch.randn(batch_size, generator=rng, device=rng.device)
    return torch.sigmoid(config.mean + config.std * normal)
