"""What is measured, on how many images."""

from pydantic import Field

from vavae.config import Config, runtime
from vavae.metrics.config import LatentSpaceConfig, MetricsConfig


class EvaluateConfig(Config):
    """The measures of a run."""

    metrics: MetricsConfig = MetricsConfig()
    """The feature extractor."""
    images: int = Field(10_000, ge=2)
    """At most this many held-out images are reconstructed and compared with."""
    class_agreement: bool = False
    """Fit a classifier on the pixels of real images and let it judge the generated ones; for small images."""
    latent_space: LatentSpaceConfig | None = None
    """Measure how evenly the latents fill their space, as in Table 6; null does not."""
    batch_size: int = runtime(64, ge=1)
    """Images that pass the tokenizer at a time."""
    pictures: int = runtime(10, ge=1)
    """Pairs of original and reconstruction in `reconstructions.png`."""
