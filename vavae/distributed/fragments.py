"""A state dict as the parts that ranks hold of it: the form in which weights are averaged, gathered and stored.

A parameter is flattened and dealt to the ranks in equal runs, the last ones shorter: ZeRO stage 3's own partition, and
a view of the whole parameter in every other engine. A buffer belongs to the first rank.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vavae.distributed.world import World

_OFFSETS = "offsets"


class Fragment(NamedTuple):
    """A run of the values of a flattened tensor."""

    offset: int
    """Index of the first value in the whole."""
    values: Tensor
    """[n]; n is 0 where a rank holds nothing of the tensor."""
    shape: torch.Size
    """Of the whole."""


class Partition(NamedTuple):
    """Where a parameter that is not whole on any rank keeps its values."""

    values: Tensor
    """[n], this rank's equal share; padding may follow the last value of the whole."""
    shape: torch.Size
    """Of the whole."""


def fragments_of(
    module: nn.Module, world: World, partition: Callable[[nn.Parameter], Partition | None] = lambda _: None
) -> dict[str, Fragment]:
    """This rank's part of every entry of a module's state dict, by name, in the same order on every rank.

    The values are views of parameters and buffers wherever those are contiguous.

    Args:
        module: the module.
        world: the ranks.
        partition: finds the values of a parameter that the ranks have divided already.
    """
    parts = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        divided = partition(tensor) if isinstance(tensor, nn.Parameter) else None
        shape = tensor.shape if divided is None else divided.shape
        numel = shape.numel()
        share = -(-numel // world.size) if isinstance(tensor, nn.Parameter) else numel
        first = min(world.rank * share, numel)
        last = min(first + share, numel)
        values = tensor.flatten()[first:last] if divided is None else divided.values[: last - first]
        parts[name] = Fragment(first, values.detach(), shape)
    return parts


def whole(parts: Mapping[str, Fragment], world: World) -> dict[str, Tensor]:
    """The tensors that the fragments of all ranks make up, on the CPU. Every rank calls it."""
    tensors = {}
    for name, part in parts.items():
        flat = part.values.new_zeros(part.shape.numel())
        flat[part.offset : part.offset + len(part.values)] = part.values
        tensors[name] = world.sum(flat).view(part.shape).cpu()
    return tensors


def save_fragments(parts: Mapping[str, Fragment], file: Path) -> None:
    """Write one rank's fragments: values under the names of the tensors, offsets as metadata."""
    offsets = {name: part.offset for name, part in parts.items()}
    save_file({name: part.values for name, part in parts.items()}, file, {_OFFSETS: json.dumps(offsets)})


def load_fragments(parts: Mapping[str, Fragment], folder: Path) -> None:
    """Fill a rank's fragments from the files of all ranks, strictly; other fragments of the same tensors will do."""
    missing = {name: len(part.values) for name, part in parts.items()}
    for path in sorted(folder.iterdir()):
        with safe_open(path, framework="pt") as file:
            for name, offset in json.loads(file.metadata()[_OFFSETS]).items():
                saved = file.get_slice(name)
                saved_end = offset + saved.get_shape()[0]
                assert name in parts, f"{path}: {name} is of another module"
                first, values, shape = parts[name]
                assert saved_end <= shape.numel(), f"{path}: {name} is of another module"
                low, high = max(offset, first), min(saved_end, first + len(values))
                if low < high:
                    values[low - first : high - first] = saved[low - offset : high - offset]
                    missing[name] -= high - low
    lacking = [name for name, values in missing.items() if values]
    assert not lacking, f"{folder}: of another module, without all of {lacking[0]}"
