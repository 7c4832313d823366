"""Files of weights that others wrote or will read: tensors by name, and nothing that can run code."""

import argparse
import os
import pickle
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vavae.errors import UserError
from vavae.storage.storage import Storage

_SAFETENSORS = ".safetensors"
_PICKLED = (".pt", ".pth", ".ckpt", ".bin")
_NESTS = ("ema", "model", "state_dict")
"""Keys under which training scripts keep a state dict beside other things, the one to prefer first."""
_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that wrappers (data parallelism, compilation) put before every name."""
_HARMLESS: list[Any] = [argparse.Namespace]
"""Scripts of the DiT family store their arguments so; it holds attributes and does nothing."""
_DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)
"""Exceptions of PyTorch for a file that is cut off, has wrong bytes in it or is no checkpoint at all."""


@dataclass(frozen=True)
class WeightsFile:
    """Tensors of one file by name, as they are stored."""

    url: str
    tensors: Mapping[str, Tensor]
    """Tensors by name; mapped into memory where the format allows it, so what nobody copies is never read."""
    stored_names: Mapping[str, str] = field(default_factory=dict)
    """Names in the file, by name here, of tensors that were renamed; for messages."""

    def shape(self, kind: str, name: str, dims: int) -> tuple[int, ...]:
        """Shape of a tensor that every file of a kind has.

        Args:
            kind: the kind of model, such as "LightningDiT".
            name: name of the tensor.
            dims: number of its dimensions.

        Raises:
            UserError: there is no such tensor, or it has another number of dimensions.
        """
        if name not in self.tensors:
            raise UserError(f"{self.url}: no tensor {name}, which every {kind} has; this looks like {self._likeness()}")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != dims:
            raise UserError(f"{self.url}: {name} is {list(shape)}, expected {dims} dimensions; this is no {kind}")
        return shape

    def expect(self, kind: str, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor that every file of a kind has.

        Args:
            kind: the kind of model, such as "LightningDiT".
            name: name of the tensor.
            shape: shape that it must have.

        Raises:
            UserError: it is missing or of another shape.
        """
        found = self.shape(kind, name, len(shape))
        if found != tuple(shape):
            raise UserError(f"{self.url}: {name} is {list(found)}, expected {list(shape)}")
        return self.tensors[name]

    def part(self, *prefixes: str) -> "WeightsFile":
        """The tensors whose names begin with one of the prefixes."""
        return replace(self, tensors={name: self.tensors[name] for name in self.tensors if name.startswith(prefixes)})

    def without(self, *prefixes: str) -> "WeightsFile":
        """The tensors whose names begin with none of the prefixes."""
        dropped = self.part(*prefixes).tensors
        return replace(self, tensors={name: self.tensors[name] for name in self.tensors if name not in dropped})

    def _likeness(self) -> str:
        """Kind of model that the names suggest, in words."""
        for mark, kind in _MARKS.items():
            if mark in self.tensors:
                return kind
        examples = ", ".join(list(self.tensors)[:3])
        return f"none of the models known here: {len(self.tensors)} tensors, such as {examples}"


_MARKS = {
    "decoder.mid.attn_1.q.weight": "a tokenizer",
    "decoder.mid_block.resnets.0.conv1.weight": "an AutoencoderKL of diffusers",
    "blocks.0.adaLN_modulation.1.weight": "a LightningDiT or DiT",
    "main.0.weight": "a patch discriminator",
    "cls_token": "a vision transformer",
    "layer1.0.conv1.weight": "a ResNet",
    "features.0.weight": "a VGG",
}
"""A tensor of each kind of model that somebody might take for another."""


def read_weights(path: str | os.PathLike[str], nest: str | None = None) -> WeightsFile:
    """Read a checkpoint: a state dict, or one under `ema`, `model` or `state_dict`, the first of these that exists.

    Args:
        path: local path or storage URL of a `.pt`, `.pth`, `.ckpt`, `.bin` or `.safetensors` file.
        nest: key that holds the state dict, in place of all these ways.

    Raises:
        UserError: no such file, it is damaged, holds no state dict, or can't be read without running code from it.
    """
    storage = Storage(os.fspath(path))
    url, suffix = storage.url(), _suffix(path)
    try:
        local = storage.local_file()
    except FileNotFoundError:
        raise UserError(f"{url}: no such file") from None
    stored = _read_safetensors(url, local) if suffix == _SAFETENSORS else _read_pickled(url, local)
    return WeightsFile(url, _unwrapped(_state_dict(url, stored, nest)))


def write_weights(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], nest: str) -> None:
    """Write tensors bitwise: a flat `.safetensors` file, or `{nest: tensors}` for `torch.load`.

    Args:
        path: local path or storage URL; the suffix names the format.
        tensors: tensors by name.
        nest: key above them in formats of `torch.load`.

    Raises:
        UserError: the suffix is none of those that `read_weights` takes, or the file can't be written.
    """
    storage, suffix = Storage(os.fspath(path)), _suffix(path)
    # A view would take the whole tensor that it is part of into the file.
    owned = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    try:
        with storage.create("") as local:
            if suffix == _SAFETENSORS:
                save_file(owned, local)
            else:
                torch.save({nest: owned}, local)
    except OSError as error:
        raise UserError(f"{storage.url()}: cannot write there ({error.strerror or error})") from error


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = PurePosixPath(os.fspath(path)).suffix
    if suffix not in (_SAFETENSORS, *_PICKLED):
        raise UserError(f"{os.fspath(path)}: a file of weights ends in {', '.join([*_PICKLED, _SAFETENSORS])}")
    return suffix


def _read_safetensors(url: str, local: Path) -> dict[str, Tensor]:
    try:
        return load_file(local)
    except SafetensorError as error:
        raise UserError(f"{url}: cut off, or no safetensors file ({error}); fetch it again") from error


def _read_pickled(url: str, local: Path) -> Any:
    with local.open("rb") as file:
        zipped = file.read(2) == b"PK"  # the format before PyTorch 1.6 is no archive and cannot be mapped
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(local, map_location="cpu", weights_only=True, mmap=zipped)
    except _DAMAGE as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is None:
            raise UserError(f"{url}: cut off, or no PyTorch checkpoint; fetch it again") from error
        raise UserError(
            f"{url}: holds a {code[1]}, and reading that can run code; where you trust the file, convert it once: load "
            "it with weights_only=False and save its state dict alone"
        ) from error


def _state_dict(url: str, stored: Any, nest: str | None) -> Mapping[str, Tensor]:
    nests = _NESTS if nest is None else (nest,)
    if isinstance(stored, Mapping):
        nested = (stored[each] for each in nests if isinstance(stored.get(each), Mapping) and stored[each])
        found = next(nested, stored if nest is None else None)
        if found and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()):
            return found
        held = f"a mapping of {', '.join(map(str, list(found or stored)[:5]))}" if stored else "nothing"
    else:
        held = f"a {type(stored).__name__}"
    expected = "tensors by name, or such a mapping" if nest is None else "tensors by name"
    raise UserError(f"{url}: holds {held}, expected {expected} under {', '.join(nests)}")


def _unwrapped(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors without what wrappers have put before all their names."""
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            return _unwrapped({name.removeprefix(wrapper): tensor for name, tensor in tensors.items()})
    return tensors
