"""Configuration: the base class, YAML with inheritance and overrides, digests. Each room owns its own models."""

from vavae.config.base import Config, differences, digest, identity, runtime

__all__ = ["Config", "differences", "digest", "identity", "runtime"]
