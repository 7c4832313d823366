"""What the measures look through."""

from typing import Literal

from pydantic import Field

from vavae.config import Config, runtime


class MetricsConfig(Config):
    """Settings of the measures."""

    extractor: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    """The network whose pooled features the Fréchet distance compares; distances of two extractors do not compare."""
    batch_size: int = runtime(64, ge=1)
    """Images per forward pass of the extractor."""


class LatentSpaceConfig(Config):
    """The density measures of the paper's Table 6; a map of 10,000 tokens takes minutes."""

    tokens: int = Field(10_000, ge=100)
    """Latent vectors that are mapped at a time, each of another training image; fewer where there are fewer images."""
    samplings: int = Field(10, ge=1)
    """How often they are drawn; the measures are means over the samplings, with their standard deviation."""
    processes: int = runtime(1, ge=1)
    """Samplings that are mapped at the same time."""
