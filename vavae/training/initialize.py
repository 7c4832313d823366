"""Initial weights as a function of the seed alone."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from vavae.randomness import key_seed

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def initialized(seed: int, purpose: str, build: Callable[[], ModuleT]) -> ModuleT:
    """Build a module on the CPU with weights keyed by (seed, purpose), leaving the global generator as it was.

    PyTorch's layers initialize themselves from the global generator; it is set for the length of the call only.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_seed(seed, "weights", purpose))
        return build()
