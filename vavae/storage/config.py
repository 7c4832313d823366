"""Configuration of storage: the root of all artifacts, the cache, and retries."""

from typing import Annotated

from vavae.config import Config, LocalPath, runtime


class StorageOptions(Config):
    """Access to a store. Keys come from the usual chain (environment, profile, role) and are never fields."""

    endpoint: str | None = runtime(None)
    """URL of an S3 server other than Amazon's; without it AWS_ENDPOINT_URL or the profile decides."""

    region: str | None = runtime(None)
    """Region of the S3 buckets; without it AWS_DEFAULT_REGION or the profile decides."""

    profile: str | None = runtime(None)
    """Profile of the AWS configuration files whose keys are used."""

    anonymous: bool = runtime(False)
    """Ask S3 without any key, for public buckets."""

    ca_bundle: Annotated[str, LocalPath()] | None = runtime(None)
    """PEM file of the certificate authorities that the S3 server is trusted by."""

    attempts: int = runtime(10, ge=1)
    """Attempts at a request, counted anew with every byte that gets through."""

    operation_seconds: float = runtime(600.0, gt=0)
    """Seconds after the last byte that got through, from which on no request is tried again."""

    backoff_seconds: float = runtime(0.2, gt=0)
    """Longest pause in seconds before the second attempt; it doubles with every further one, up to 20 seconds."""

    connect_seconds: float = runtime(10.0, gt=0)
    """Seconds that an S3 server may take to accept a connection."""

    read_seconds: float = runtime(60.0, gt=0)
    """Seconds that an S3 server may stay silent in the middle of an answer."""

    connections: int = runtime(4, ge=1)
    """Parts of one file that are fetched or put at the same time."""

    cache_bytes: int = runtime(100_000_000_000, ge=1)
    """Most bytes in the cache; the least recently used files go first. Open ones keep their space until closed."""


class StorageConfig(StorageOptions):
    """The root of everything that a run reads and writes."""

    root: Annotated[str, LocalPath()] = runtime("runs")
    """Folder or URL of any file system that fsspec knows (s3://bucket/prefix, gs://..., hf://..., memory://...)."""

    cache: Annotated[str, LocalPath()] | None = runtime(None)
    """Folder of each machine for whole files fetched from a URL, shared by all its processes; null is one of this user
    below the machine's temporary folder (TMPDIR, or else /tmp)."""
