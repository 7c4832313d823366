"""Named tensors as the parts that ranks hold of them: the form in which weights are averaged, gathered and stored.

A parameter is flattened and dealt to the ranks in equal runs, the last ones shorter: ZeRO stage 3's own partition, and
a view of the whole parameter in every other engine. A buffer belongs to the first rank. A file says of every part where
in the whole it belongs, so that whatever some ranks have saved is read by any number of them, divided in any other way.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Size, Tensor, nn

from vavae.distributed.world import World

_OFFSETS = "offsets"


class TensorShard(NamedTuple):
    """A run of the values of a flattened tensor."""

    offset: int
    """Index of the first value in the whole."""
    values: Tensor
    """[n]; n is 0 where a rank holds nothing of the tensor."""
    shape: Size
    """Of the whole."""


class Partition(NamedTuple):
    """Where a parameter that is not whole on any rank keeps its values."""

    values: Tensor
    """[n], this rank's equal share; padding may follow the last value of the whole."""
    shape: Size
    """Of the whole."""

    def tensor_shard(self, world: World) -> TensorShard:
        """The share without its padding."""
        first, last = _share(self.shape, world)
        return TensorShard(first, self.values.detach()[: last - first], self.shape)


FindPartition = Callable[[nn.Parameter], Partition | None]
"""Finds the values of a parameter that the ranks have divided already; None where every rank holds all of them."""


def not_sharded(_: nn.Parameter) -> None:
    """Every rank holds all values."""


def _share(shape: Size, world: World) -> tuple[int, int]:
    """First index of this rank's values among all of a parameter, and the first behind them."""
    numel = shape.numel()
    size = -(-numel // world.size)
    return min(world.rank * size, numel), min((world.rank + 1) * size, numel)


def shard_of(tensor: Tensor, world: World) -> TensorShard:
    """This rank's share of a tensor that every rank holds; a view where the tensor is contiguous."""
    first, last = _share(tensor.shape, world)
    return TensorShard(first, tensor.detach().flatten()[first:last], tensor.shape)


def as_full_shard(tensor: Tensor) -> TensorShard:
    """A whole tensor, contiguous, as one fragment: a view."""
    return TensorShard(0, tensor.detach().view(-1), tensor.shape)


def tensor_shards_of(module: nn.Module, world: World, partition: FindPartition = not_sharded) -> dict[str, TensorShard]:
    """This rank's part of every entry of a module's state dict, by name, in the same order on every rank.

    The values are views of parameters and buffers wherever those are contiguous.
    """
    parts = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, nn.Parameter):
            parts[name] = as_full_shard(tensor) if world.is_first else TensorShard(0, tensor.new_empty(0), tensor.shape)
        elif (divided := partition(tensor)) is not None:
            parts[name] = divided.tensor_shard(world)
        else:
            parts[name] = shard_of(tensor, world)
    return parts


def local_shards(module: nn.Module, world: World, partition: FindPartition = not_sharded) -> dict[str, TensorShard]:
    """All that this rank holds of a module's state dict, by name, as views; whole tensors must be contiguous."""
    parts = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        divided = partition(tensor) if isinstance(tensor, nn.Parameter) else None
        parts[name] = as_full_shard(tensor) if divided is None else divided.tensor_shard(world)
    return parts


def gather_full(parts: Mapping[str, TensorShard], world: World) -> dict[str, Tensor]:
    """The tensors that the fragments of all ranks make up, on the CPU. Every rank calls it."""
    tensors = {}
    for name, part in parts.items():
        flat = part.values.new_zeros(part.shape.numel())
        flat[part.offset : part.offset + len(part.values)] = part.values
        tensors[name] = world.sum(flat).view(part.shape).cpu()
    return tensors


def save_tensor_shards(parts: Mapping[str, TensorShard], file: Path) -> None:
    """Write one rank's fragments: values under the names of the tensors, offsets as metadata."""
    offsets = {name: part.offset for name, part in parts.items()}
    save_file({name: part.values for name, part in parts.items()}, file, {_OFFSETS: json.dumps(offsets)})


def load_tensor_shards(parts: Mapping[str, TensorShard], files: Iterable[Path]) -> None:
    """Fill a rank's fragments from the files of all ranks, strictly; other fragments of the same tensors will do."""
    missing = {name: len(part.values) for name, part in parts.items()}
    for path in files:
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
    assert not lacking, f"files of another module, without all of {lacking[0]}"
