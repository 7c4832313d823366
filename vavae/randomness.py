"""Randomness as a function of its use: every draw is keyed by (seed, purpose, position), never by rank or time."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # orders need no torch, and commands that only plan start in a fraction of its import
    import torch


def key_seed(seed: int, *key: int | str) -> int:
    """Mix a seed and a key (a purpose, a lane, a step, an image index …) into 63 well-distributed bits.

    Words are hashed, integers enter as they are; NumPy's documented ``SeedSequence`` does the mixing.
    """
    words = [seed]
    for part in key:
        words.append(
            part if isinstance(part, int) else int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "big")
        )
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_generator(seed: int, *key: int | str, device: "torch.device | str" = "cpu") -> "torch.Generator":
    """Create the rng of one key: equal keys give equal draws on one device type."""
    import torch

    return torch.Generator(device).manual_seed(key_seed(seed, *key))


def numpy_generator(seed: int, *key: int | str) -> np.random.Generator:
    """Create the NumPy counterpart of :func:`torch_generator`, for orders, crops and flips."""
    return np.random.default_rng(key_seed(seed, *key))
