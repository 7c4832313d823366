"""The order of samples: a pure function of (counts, seed, position), whatever the number of ranks and loader workers.

Epoch e permutes the shards by (seed, e), concatenates their records, drops the last N mod L and cuts the rest into L
equal ranges, one per *lane* (a virtual rank). A lane shuffles consecutive blocks of its range by (seed, e, lane,
block). A step takes one *micro-batch* of consecutive positions from every lane and straddles epochs freely.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vavae.data.config import StreamConfig
from vavae.errors import UserError
from vavae.randomness import numpy_generator


class Location(NamedTuple):
    """Location of one record: the shard's index in the manifest and the record's index in the shard."""

    shard: int
    record: int


class Block(NamedTuple):
    """Consecutive records of a lane that are shuffled together."""

    position: int
    """Position at which the lane enters the block."""
    shards: tuple[int, ...]
    """Indices in the manifest of the shards that hold its records, in the order of the epoch."""


class SampleOrder:
    """Endless order of the records of one split, cut into lanes.

    Args:
        counts: number of records of each shard, in manifest order.
        seed: the run's seed.
        lanes: L, the number of virtual ranks; fixed for the life of a run.
        block: number of consecutive records of a lane that are shuffled together.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, seed: int, lanes: int, block: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.seed, self.lanes, self.block = seed, lanes, block
        self.records_per_lane = int(self.counts.sum()) // lanes
        """Positions of one lane in one epoch, ⌊N / L⌋."""
        if self.records_per_lane == 0:
            raise UserError(
                f"stream.lanes={lanes}: the split has only {int(self.counts.sum())} records; "
                "every lane needs one: lower stream.lanes or add images"
            )
        # Caches belong to the instance: a micro-batch asks for the same epoch and block again and again.
        self._epoch = lru_cache(maxsize=2)(self._permuted_shards)
        self._shuffle = lru_cache(maxsize=4 * lanes)(self._permuted_block)

    def __reduce__(self) -> tuple[type["SampleOrder"], tuple[np.ndarray, int, int, int]]:
        return type(self), (self.counts, self.seed, self.lanes, self.block)

    def micro_batch(self, lane: int, step: int, size: int) -> list[Location]:
        """The records of one lane's micro-batch of a step: positions [step · size, (step + 1) · size) of the lane."""
        found: list[Location] = []
        position, end = step * size, (step + 1) * size
        while position < end:
            part = self._rest_of_block(lane, position, end - position)
            found += part
            position += len(part)
        return found

    def locate(self, lane: int, position: int) -> Location:
        """The record at one position of a lane."""
        return self._rest_of_block(lane, position, 1)[0]

    def blocks(self, lane: int, position: int) -> Iterator[Block]:
        """The block that a position of a lane lies in, entered there, and all that follow, without end."""
        while True:
            epoch, offset = divmod(position, self.records_per_lane)
            end = min((offset // self.block + 1) * self.block, self.records_per_lane)
            shards, ends = self._epoch(epoch)
            records = lane * self.records_per_lane + np.array([offset // self.block * self.block, end - 1])
            first, last = np.searchsorted(ends, records, side="right")
            slots = shards[first : last + 1]
            yield Block(position, tuple(slots[self.counts[slots] > 0].tolist()))
            position = epoch * self.records_per_lane + end

    def _rest_of_block(self, lane: int, position: int, limit: int) -> list[Location]:
        """The records from a position on, up to the end of its block."""
        epoch, offset = divmod(position, self.records_per_lane)
        block, within = divmod(offset, self.block)
        chosen = self._shuffle(epoch, lane, block)[within : within + limit]
        indices = lane * self.records_per_lane + block * self.block + chosen
        shards, ends = self._epoch(epoch)
        slots = np.searchsorted(ends, indices, side="right")
        found = shards[slots]
        records = indices - (ends[slots] - self.counts[found])
        return list(map(Location, found.tolist(), records.tolist()))

    def _permuted_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the order of an epoch, and the running count of records at the end of each."""
        shards = numpy_generator(self.seed, "shards", epoch).permutation(len(self.counts))
        return shards, np.cumsum(self.counts[shards])

    def _permuted_block(self, epoch: int, lane: int, block: int) -> np.ndarray:
        size = min(self.block, self.records_per_lane - block * self.block)
        return numpy_generator(self.seed, "block", epoch, lane, block).permutation(size)


def order_of(counts: Sequence[int] | np.ndarray, seed: int, config: StreamConfig) -> SampleOrder:
    """Build the order of a configuration; by default L · K, the records shuffled together, is min(N, 65,536)."""
    block = config.block or max(1, -(-min(int(np.sum(counts)), 65_536) // config.lanes))
    return SampleOrder(counts, seed, config.lanes, block)


class AccumulationStep(NamedTuple):
    """One forward and backward pass of a rank: a lane's micro-batch and the factor of its loss."""

    lane: int
    weight: float


def assign_lanes(lanes: int, rank: int, world_size: int) -> tuple[AccumulationStep, ...]:
    """Assign a rank its contiguous lanes, one per accumulation step; every rank has ⌈L / W⌉ accumulation steps.

    The weights make the mean over all accumulation steps and ranks equal the mean over lanes: a rank with fewer lanes
    than accumulation steps repeats its first micro-batch with weight 0.
    """
    if world_size > lanes:
        raise UserError(f"workers.count={world_size}: at most one worker per lane, and stream.lanes={lanes}")
    count = -(-lanes // world_size)
    own = np.array_split(np.arange(lanes), world_size)[rank].tolist()
    weight = count * world_size / lanes
    return (*(AccumulationStep(lane, weight) for lane in own), *[AccumulationStep(own[0], 0.0)] * (count - len(own)))


class LaneGroup(NamedTuple):
    """Lanes of a rank that one forward and backward pass takes together."""

    indices: tuple[int, ...]
    """Positions of their micro-batches among the rank's accumulation steps."""
    weight: float
    """Factor of the mean loss over the group."""


def group_lanes(lanes: int, rank: int, world_size: int, at_once: int) -> tuple[LaneGroup, ...]:
    """Group the lanes of a rank by `at_once`; every rank has as many groups.

    With G groups on each of W ranks a group of k lanes weighs k · G · W / L, so that the mean over groups and ranks is
    the mean over L lanes. Repeated micro-batches are left out, but where a rank would have nothing to do.
    """
    own = assign_lanes(lanes, rank, world_size)
    real = [index for index, step in enumerate(own) if step.weight > 0]
    count = -(-len(own) // at_once)
    groups = [tuple(real[start : start + at_once]) for start in range(0, count * at_once, at_once)]
    return tuple(LaneGroup(group or (0,), len(group) * count * world_size / lanes) for group in groups)
