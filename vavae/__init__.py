"""VA-VAE tokenizers and LightningDiT: aligned latent spaces and the diffusion transformers trained on them.

`__all__` is the interface for notebooks and scripts, with examples in the README of this folder. Each of its names is
imported when it is first used: to import the package imports nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vavae.data.pixels import image_grid
    from vavae.errors import UserError
    from vavae.interop.load import load_lightningdit, load_tokenizer
    from vavae.latents.pictures import decode, encode
    from vavae.runs.config import RunConfig
    from vavae.runs.run import Run
    from vavae.sampling.sampler import Sampler

__all__ = [
    "Run",
    "RunConfig",
    "Sampler",
    "UserError",
    "decode",
    "encode",
    "image_grid",
    "load_lightningdit",
    "load_tokenizer",
]

_MODULES = {
    "Run": "vavae.runs.run",
    "RunConfig": "vavae.runs.config",
    "Sampler": "vavae.sampling.sampler",
    "UserError": "vavae.errors",
    "decode": "vavae.latents.pictures",
    "encode": "vavae.latents.pictures",
    "image_grid": "vavae.data.pixels",
    "load_lightningdit": "vavae.interop.load",
    "load_tokenizer": "vavae.interop.load",
}
"""Module of each name."""


def __getattr__(name: str) -> Any:
    """Import a name of the interface (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*__all__]
