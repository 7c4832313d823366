"""Compilation of the blocks of networks, on the device where they compute."""

import inspect
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
import torch._functorch.config
from torch import nn

from vavae.distributed.config import WorkersConfig

_OLDEST_CAPABILITY = (7, 0)
"""Compute capability from which on triton compiles for a GPU."""
_SHAPES = 128
"""Most kinds of blocks of one class, which differ in channels and resolution."""


def compiles_blocks(
    setting: bool | None, workers: WorkersConfig, device: torch.device, whole_weights: bool = True
) -> bool:
    """Return whether blocks are compiled.

    Args:
        setting: `compile_blocks` of the configuration; None does on GPUs that promise no bits, where there is a
            compiler.
        workers: whether bits are promised.
        device: where the blocks compute.
        whole_weights: whether all weights of a block are there at any time; None does only then.
    """
    if setting is not None:
        return setting
    if device.type != "cuda" or workers.deterministic or not whole_weights:
        return False
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= _OLDEST_CAPABILITY


def compile_each(blocks: Iterable[nn.Module]) -> None:
    """Compile blocks in place, each for its own shapes; they keep their names and weights."""
    # The adaptive weights differentiate a graph several times, so a backward pass may not write to what it is given.
    torch._functorch.config.donated_buffer = False
    limit: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        # Torch that takes it here keeps torch._dynamo.config for each thread, and blocks may be called in another.
        limit = {"recompile_limit": _SHAPES}
    else:
        from torch._dynamo import config

        config.cache_size_limit = _SHAPES  # torch 2.6 has no other name for it, later ones know both
    for block in blocks:
        block.compile(dynamic=False, **limit)
