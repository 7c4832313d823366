"""Configuration: the base class, YAML with inheritance and overrides, digests. Each room owns its own models."""

from vavae.config.base import Config, added, differences, digest, identity, runtime
from vavae.config.command import Arguments, parse_arguments, run_command
from vavae.config.load import dump, load
from vavae.config.paths import LocalPath, resolve_paths, written_path

__all__ = [
    "Arguments",
    "Config",
    "LocalPath",
    "added",
    "differences",
    "digest",
    "dump",
    "identity",
    "load",
    "parse_arguments",
    "resolve_paths",
    "run_command",
    "runtime",
    "written_path",
]
