"""Which images are generated."""

from pydantic import Field

from vavae.config import Config, runtime


class SampleConfig(Config):
    """A class-balanced set of generated images: image i shows class i mod (number of classes)."""

    images: int = Field(1000, ge=1)
    """How many images."""
    shard_images: int = Field(500, ge=1)
    """Images of one output shard, the unit that is made at once and resumed."""
    batch_size: int = runtime(100, ge=1)
    """Images integrated at a time."""
    actors: int = runtime(1, ge=1)
    """Shards generated at the same time, each by `workers.cpus` cores or one GPU."""
    picture_columns: int = runtime(10, ge=1)
    """Images per class in the picture `samples.png`."""
