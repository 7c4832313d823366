"""Compilation of the blocks of networks, on the device that trains them."""

from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import nn

from vavae.distributed.config import EngineConfig, WorkersConfig

_OLDEST_CAPABILITY = (7, 0)
"""Compute capability from which on triton compiles for a GPU."""
_SHAPES = 128
"""Most kinds of blocks of one class, which differ in channels and resolution."""


def compiles_blocks(setting: bool | None, engine: EngineConfig, workers: WorkersConfig, device: torch.device) -> bool:
    """Return whether blocks are compiled, where `compile_blocks` is `setting`."""
    if setting is not None:
        return setting
    if device.type != "cuda" or workers.deterministic or not engine.has_whole_weights:
        return False
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= _OLDEST_CAPABILITY


def compile_each(blocks: Iterable[nn.Module]) -> None:
    """Compile blocks in place, each for its own shapes; they keep their names and weights."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _SHAPES
    # The adaptive weights differentiate a graph several times, so a backward pass may not write to what it is given.
    torch._functorch.config.donated_buffer = False
    for block in blocks:
        block.compile(dynamic=False)
