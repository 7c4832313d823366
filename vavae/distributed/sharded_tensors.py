"""Shards of named tensors over the ranks: the form in which weights are averaged, gathered and stored.

A parameter is flattened and split among the ranks in equal ranges, the last ones shorter: ZeRO stage 3's own partition,
and a view of the full parameter in every other engine. A buffer belongs to the first rank.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Size, Tensor, nn

from vavae.distributed.world import World


class TensorShard(NamedTuple):
    """A contiguous range of the values of a flattened tensor."""

    offset: int
    """Index of the first value in the flattened full tensor."""
    values: Tensor
    """Values [n]; n is 0 where a rank holds nothing of the tensor."""
    shape: Size
    """Shape of the full tensor."""


class Partition(NamedTuple):
    """Values of a parameter that is partitioned, so that no rank holds it in full."""

    values: Tensor
    """Equal part [n] of this rank; padding may follow the last value of the full tensor."""
    shape: Size
    """Shape of the full tensor."""

    def tensor_shard(self, world: World) -> TensorShard:
        """Shard of this rank, without padding."""
        first, last = _range(self.shape, world)
        return TensorShard(first, self.values.detach()[: last - first], self.shape)


FindPartition = Callable[[nn.Parameter], Partition | None]
"""Function that finds the partition of a parameter; None where every rank holds it in full."""


def not_sharded(_: nn.Parameter) -> None:
    """Return None for every parameter, because every rank holds it in full."""


def _range(shape: Size, world: World) -> tuple[int, int]:
    """Start and end, exclusive, of this rank's values in a flattened parameter."""
    numel = shape.numel()
    size = -(-numel // world.size)
    return min(world.rank * size, numel), min((world.rank + 1) * size, numel)


def shard_of(tensor: Tensor, world: World) -> TensorShard:
    """Shard of this rank of a tensor that every rank holds; a view where the tensor is contiguous."""
    first, last = _range(tensor.shape, world)
    return TensorShard(first, tensor.detach().flatten()[first:last], tensor.shape)


def as_full_shard(tensor: Tensor) -> TensorShard:
    """View a full, contiguous tensor as one shard."""
    return TensorShard(0, tensor.detach().view(-1), tensor.shape)


def tensor_shards_of(module: nn.Module, world: World, partition: FindPartition = not_sharded) -> dict[str, TensorShard]:
    """Shards of this rank of every entry of a module's state dict, by name, in the same order on every rank.

    The values are views of parameters and buffers wherever those are contiguous.
    """
    parts = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, nn.Parameter):
            parts[name] = as_full_shard(tensor) if world.is_first else TensorShard(0, tensor.new_empty(0), tensor.shape)
        elif (own := partition(tensor)) is not None:
            parts[name] = own.tensor_shard(world)
        else:
            parts[name] = shard_of(tensor, world)
    return parts


def local_shards(module: nn.Module, world: World, partition: FindPartition = not_sharded) -> dict[str, TensorShard]:
    """Values that this rank holds of a module's state dict, by name, as views; full tensors must be contiguous."""
    parts = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        own = partition(tensor) if isinstance(tensor, nn.Parameter) else None
        parts[name] = as_full_shard(tensor) if own is None else own.tensor_shard(world)
    return parts


def gather_full(parts: Mapping[str, TensorShard], world: World) -> dict[str, Tensor]:
    """Gather the full tensors from the shards of all ranks, on the CPU. Every rank calls it."""
    tensors = {}
    for name, part in parts.items():
        flat = part.values.new_zeros(part.shape.numel())
        flat[part.offset : part.offset + len(part.values)] = part.values
        tensors[name] = world.sum(flat).view(part.shape).cpu()
    return tensors
