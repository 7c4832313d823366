"""Shards of named tensors over the ranks: the form in which weights are averaged, gathered and stored.

A parameter is flattened and split among the ranks in equal ranges, the last ones shorter: ZeRO stage 3's own partition,
and a view of the full parameter in every other engine. A buffer belongs to the first rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Size, Tensor, nn

from vavae.distributed.world import World

_BUCKET_BYTES = 64 << 20
"""Most bytes of full tensors that are gathered at once; a larger tensor travels alone."""


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


def copy_shards(source: Mapping[str, TensorShard], target: Mapping[str, TensorShard]) -> None:
    """Copy values into shards of the same tensors; what `source` lacks stays as it is.

    Args:
        source: shards that hold at least the ranges of those in `target`, in any type and on any device.
        target: shards to fill in place.
    """
    for name, given in source.items():
        offset, values, shape = target[name]
        assert given.shape == shape, f"{name}: of another module"
        values.copy_(given.values[offset - given.offset :][: len(values)])


def gather_full(parts: Mapping[str, TensorShard], world: World) -> dict[str, Tensor]:
    """Gather full tensors from the shards of all ranks, on the CPU of rank 0 alone. Every rank calls it.

    They travel in buckets: besides the result, rank 0 holds one of these, and any other rank its own part of one.

    Args:
        parts: this rank's shards, of the same tensors in the same order on every rank.
        world: the ranks.

    Returns:
        The full tensors by name; none on the other ranks.
    """
    shards, value_bytes = [*parts.values()], torch.tensor([[part.values.element_size()] for part in parts.values()])
    ranges = [own * value_bytes for own in world.gather(torch.tensor([(s.offset, len(s.values)) for s in shards]))]
    full = [torch.empty(shard.shape, dtype=shard.values.dtype) for shard in shards if world.is_first]
    for bucket in _buckets(shards):
        lengths = [of_rank[bucket.start : bucket.stop, 1].tolist() for of_rank in ranges]
        own = torch.cat([_bytes_of(shards[index].values).to(world.device) for index in bucket])
        gathered = world.gather_values(own, [*map(sum, lengths)])
        for rank, values in enumerate(gathered):
            for index, piece in zip(bucket, values.cpu().split(lengths[rank]), strict=True):
                start = int(ranges[rank][index, 0])
                _bytes_of(full[index])[start : start + len(piece)] = piece
    return dict(zip(parts, full, strict=True)) if world.is_first else {}


def _buckets(shards: Sequence[TensorShard]) -> Iterator[range]:
    """Split tensors, by index, into as few runs as hold no more than a bucket; a larger tensor has one of its own."""
    start, held = 0, 0
    for index, shard in enumerate(shards):
        size = shard.shape.numel() * shard.values.element_size()
        if start < index and held + size > _BUCKET_BYTES:
            yield range(start, index)
            start, held = index, 0
        held += size
    if shards:
        yield range(start, len(shards))


def _bytes_of(values: Tensor) -> Tensor:
    """View contiguous values as uint8 [n]."""
    return values.contiguous().view(-1).view(torch.uint8)
