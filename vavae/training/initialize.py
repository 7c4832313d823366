"""Initial weights as a function of the seed alone, or those of another training."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from vavae.models.dit.model import LightningDiT
from vavae.randomness import key_seed

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def initialized(seed: int, purpose: str, build: Callable[[], ModuleT]) -> ModuleT:
    """Build a module on the CPU with weights keyed by (seed, purpose), leaving the global generator as it was.

    PyTorch's layers initialize themselves from the global generator; it is set for the length of the call only.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_seed(seed, "weights", purpose))
        return build()


def uninitialized(build: Callable[[], ModuleT], device: torch.device) -> ModuleT:
    """Build a module on a device for whoever sets its whole state dict at once: until then its values are undefined.

    Nothing is computed or drawn.
    """
    with torch.device("meta"):
        module = build()
    names = module.state_dict().keys()
    lost = [name for name, _ in module.named_buffers() if name not in names]
    assert not lost, f"{lost[0]} is in no state dict, so nothing would set it"
    return module.to_empty(device=device)


def begin_with(model: LightningDiT, weights: Mapping[str, Tensor]) -> None:
    """Load a state dict; one of velocities leaves what average ones have beside it: without effect, or zero."""
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert not unknown, f"{unknown[0]} is no weight of this model"
    assert all(name.startswith(("length_embedder.", "guidance_embedder.", "final_layer_v.")) for name in missing), (
        f"no {missing[0]} among the weights"
    )
