"""Configuration: the base class, YAML with inheritance and overrides, digests. Each room owns its own models."""

from vavae.config.base import Config, added, differences, digest, identity, runtime
from vavae.config.load import dump, load
from vavae.config.paths import (
    ELSEWHERE,
    HUB_PREFIX,
    HubAddress,
    LocalPath,
    ModelAddress,
    is_hub_address,
    resolve_paths,
    without_own_folders,
    written_path,
)
from vavae.config.size import as_one_number, describe_size, height_and_width

__all__ = [
    "ELSEWHERE",
    "HUB_PREFIX",
    "Config",
    "HubAddress",
    "LocalPath",
    "ModelAddress",
    "added",
    "as_one_number",
    "describe_size",
    "differences",
    "digest",
    "dump",
    "height_and_width",
    "identity",
    "is_hub_address",
    "load",
    "resolve_paths",
    "runtime",
    "without_own_folders",
    "written_path",
]
