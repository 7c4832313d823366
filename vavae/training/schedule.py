"""The learning rate as a function of images seen."""

import math

from vavae.runs.config import ScheduleConfig


def learning_rate(peak: float, config: ScheduleConfig, images_seen: int) -> float:
    """Linear warm-up to `peak` over `warmup_images`, then constant, or a half cosine down to zero at `decay_images`."""
    if images_seen < config.warmup_images:
        return peak * (images_seen + 1) / (config.warmup_images + 1)
    if config.decay_images is None:
        return peak
    span = config.decay_images - config.warmup_images
    progress = min(1.0, (images_seen - config.warmup_images) / span)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
