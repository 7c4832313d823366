"""Where artefacts live."""

from vavae.config import Config, runtime

DEFAULT_CACHE = "~/.cache/vavae"


class StorageConfig(Config):
    """The root of everything that a run reads and writes."""

    root: str = runtime("runs")
    """Folder or URL of any file system that fsspec knows (s3://bucket/prefix, memory://...)."""

    cache: str = runtime(DEFAULT_CACHE)
    """Folder of this machine for whole files fetched from a URL."""
