"""What the measures look through."""

from typing import Literal

from vavae.config import Config, runtime


class MetricsConfig(Config):
    """Settings of the measures."""

    extractor: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    """The network whose pooled features the Fréchet distance compares; distances of two extractors do not compare."""
    batch_size: int = runtime(64, ge=1)
    """Images per forward pass of the extractor."""
