"""How latents are computed and stored."""

from pydantic import Field

from vavae.config import Config, runtime


class LatentsConfig(Config):
    """Latents of all image shards."""

    flip: bool = True
    """Store the posterior of every image's mirror image too."""
    batch_size: int = Field(64, ge=1)
    """Images encoded at a time, within a shard; fixed, because it is part of the arithmetic."""
    scale: float | None = Field(None, gt=0)
    """Train the diffusion on latents times this number instead of whitened ones (SD-VAE's is 0.18215); it changes the
    statistics alone, no latent."""
    actors: int = runtime(1, ge=1)
    """Shards encoded at the same time, each by `workers.cpus` cores or one GPU."""
