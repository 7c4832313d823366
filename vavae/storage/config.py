"""Where artefacts live, and how patiently they are fetched."""

import re
from typing import Any

from pydantic import ConfigDict, model_validator

from vavae.config import Config, runtime

DEFAULT_CACHE = "~/.cache/vavae"

# A colon before the "@" of a URL means a password, which may hold slashes; not so in S3's access points (arn:...) and
# behind a port.
_PASSWORD = re.compile(r"//(?!arn:)[^/@:]*:(?!\d+(/|$))[^@]*@")
_SECRET_QUERY = re.compile(
    r"[?&][^=&]*(signature|credential|secret|token|password|sig|key|accesskeyid)=", re.IGNORECASE
)


def without_credentials(url: str) -> str:
    """The URL itself; ValueError, which doesn't repeat it, where it carries a password or a signed query."""
    if _PASSWORD.search(url) or _SECRET_QUERY.search(url):
        scheme = url.partition("://")[0]
        raise ValueError(
            f"a {scheme}:// URL with credentials in it: take them out, they belong into the environment, "
            "a profile (storage.profile) or the machine's role"
        )
    return url


class StorageOptions(Config):
    """How a store is reached. Keys come from the usual chain (environment, profile, role) and are never fields."""

    model_config = ConfigDict(hide_input_in_errors=True)

    endpoint: str | None = runtime(None)
    """URL of an S3 server other than Amazon's; without it AWS_ENDPOINT_URL or the profile decides."""

    region: str | None = runtime(None)
    """Region of the S3 buckets; without it AWS_DEFAULT_REGION or the profile decides."""

    profile: str | None = runtime(None)
    """Profile of the AWS configuration files whose keys are used."""

    anonymous: bool = runtime(False)
    """Ask S3 without any key, for public buckets."""

    ca_bundle: str | None = runtime(None)
    """PEM file of the certificate authorities that the S3 server is trusted by."""

    attempts: int = runtime(10, ge=1)
    """How often a request is tried, counted anew with every byte that gets through."""

    operation_seconds: float = runtime(600.0, gt=0)
    """No request is tried again this long after the last byte that got through."""

    backoff_seconds: float = runtime(0.2, gt=0)
    """Longest pause before the second attempt; it doubles with every further one, up to 20 seconds."""

    connect_seconds: float = runtime(10.0, gt=0)
    """How long an S3 server may take to accept a connection."""

    read_seconds: float = runtime(60.0, gt=0)
    """How long an S3 server may stay silent in the middle of an answer."""

    connections: int = runtime(4, ge=1)
    """Parts of one file that are fetched or put at the same time."""

    cache_bytes: int = runtime(100_000_000_000, ge=1)
    """Bound of the cache; what was used longest ago is dropped first. Files in use keep their space until closed."""

    @model_validator(mode="before")
    @classmethod
    def _no_credentials(cls, values: Any) -> Any:
        # Not a validator of the field: the message about one shows its value.
        for name in ("root", "endpoint"):
            try:
                without_credentials(str(values.get(name, "")))
            except ValueError as error:
                raise ValueError(f"{name} is {error}") from None
        return values


class StorageConfig(StorageOptions):
    """The root of everything that a run reads and writes."""

    root: str = runtime("runs")
    """Folder or URL of any file system that fsspec knows (s3://bucket/prefix, gs://..., hf://..., memory://...)."""

    cache: str = runtime(DEFAULT_CACHE)
    """Folder of this machine for whole files fetched from a URL, shared by all its processes."""
