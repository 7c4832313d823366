"""How latents are computed and stored."""

from pydantic import Field

from vavae.config import Config, runtime


class LatentsConfig(Config):
    """Latents of all image shards."""

    flip: bool = True
    """Store the posterior of every image's mirror image too."""
    batch_size: int = Field(64, ge=1)
    """Images encoded at a time, within a shard; fixed, because it is part of the arithmetic."""
    actors: int = runtime(1, ge=1)
    """Shards encoded at the same time, each by `workers.cpus` cores or one GPU."""
