"""Prefetching of shards from a store: by one thread, in the stream's order, within a bound of bytes."""

import heapq
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple, TypeVar

from vavae.data.sample_order import AccumulationStep, SampleOrder
from vavae.data.shards.manifest import ShardList, is_local, open_shard, shard_file
from vavae.errors import UserError
from vavae.storage.storage import Storage

logger = logging.getLogger(__name__)
THREAD = "vavae-prefetch"

T = TypeVar("T")


class Need(NamedTuple):
    """A shard that a lane enters at a step."""

    step: int
    lane: int
    shard: int
    """Index in the manifest."""
    block: tuple[int, ...]
    """Indices of all shards that the lane draws from at that step."""


@dataclass(frozen=True)
class OrderedShards:
    """The shards of one split, and the order in which a stream reads them. Small to pickle."""

    storage: Storage
    """The folder of the manifest."""
    split: str
    infos: ShardList
    order: SampleOrder
    micro_batch_size: int
    """Records of a micro-batch."""

    def open(self, shard: int, open_file: Callable[[Path], T]) -> T:
        """Open the local file of a shard with `open_file` and return its result; see `open_shard`."""
        return open_shard(self.storage, self.split, self.infos[shard], open_file)

    def fetch(self, shard: int, step: int) -> None:
        """Bring what a step reads of a shard of a store into the cache, where it is not in it yet."""
        if not is_local(self.storage, self.infos[shard]):
            shard_file(self.storage, self.split, self.infos[shard])

    def bytes_of(self, shards: Iterable[int], step: int) -> int:
        """Total size of what a step reads of some shards, bytes."""
        return int(self.infos.sizes[[*shards]].sum())

    @property
    def are_local(self) -> bool:
        """Return whether all shards surely lie on this machine."""
        return self.storage.is_local and not self.infos.has_urls

    def open_bytes(self, lanes: Iterable[int]) -> int:
        """Most bytes of shards that some lanes draw from at the same time, computed from the first epoch and step."""
        blocks = zip(*(self.order.blocks(lane, 0) for lane in lanes), strict=True)
        epoch = takewhile(lambda abreast: abreast[0].position < self.order.records_per_lane, blocks)
        return max(self.bytes_of({shard for block in abreast for shard in block.shards}, 0) for abreast in epoch)

    def needs(self, accumulation_steps: Sequence[AccumulationStep], first_step: int) -> Iterator[Need]:
        """Yield the shards that lanes enter from a step on, in the order of their first use, without end."""
        lanes = dict.fromkeys(accumulation_step.lane for accumulation_step in accumulation_steps)
        return heapq.merge(*(self._needs(lane, first_step) for lane in lanes), key=lambda need: need.step)

    def _needs(self, lane: int, first_step: int) -> Iterator[Need]:
        before: tuple[int, ...] = ()
        for position, block in self.order.blocks(lane, first_step * self.micro_batch_size):
            if position % self.order.records_per_lane == 0:
                before = ()  # a lane that never leaves a shard enters it anew: iterating over its needs must end
            yield from (
                Need(position // self.micro_batch_size, lane, shard, block) for shard in block if shard not in before
            )
            before = block


class ShardPrefetcher:
    """A thread that fetches the shards of a rank's coming micro-batches into the node's cache.

    It prefetches so little that the cache, which drops what was asked for longest ago, doesn't drop it before it is
    used: while a shard waits, those that wait with it at the beginning and those at the end go through the cache, so
    twice as much as waits must fit beside what is open. Errors are left to the stream, which meets them in order.

    Args:
        shards: the shards that the stream reads.
        accumulation_steps: the lanes of this rank.
        first_step: where the stream begins.
        limit: most bytes that wait, but always the next shard.
        ranks: processes that share the cache.
    """

    def __init__(
        self,
        shards: OrderedShards,
        accumulation_steps: Sequence[AccumulationStep],
        first_step: int,
        limit: int,
        ranks: int = 1,
    ) -> None:
        self._shards = shards
        self._limit, self._share = limit, shards.storage.options.cache_bytes // ranks
        self._horizon = -(
            -shards.order.records_per_lane // shards.micro_batch_size
        )  # steps of an epoch: has all shards
        self._step = first_step
        self._waiting: deque[Need] = deque()
        self._open: dict[int, set[int]] = {}
        self._changed, self._closed = threading.Condition(), False
        needs = shards.needs(accumulation_steps, first_step)
        threading.Thread(target=self._run, args=(needs,), name=THREAD, daemon=True).start()

    def reached(self, step: int) -> None:
        """Note that the stream asks for a step now."""
        with self._changed:
            self._step = step
            while self._waiting and self._waiting[0].step <= step:
                self._enter(self._waiting.popleft())
            self._changed.notify()

    def close(self) -> None:
        """Stop the thread after the shard that it is fetching."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self, needs: Iterator[Need]) -> None:
        for need in needs:
            wanted = self._admit(need)
            if self._closed:
                return
            if wanted:
                try:
                    self._shards.fetch(need.shard, need.step)
                except (UserError, OSError) as error:
                    logger.debug("prefetch: %s", error)

    def _admit(self, need: Need) -> bool:
        """Wait until there is room for a shard; return whether it is still to be fetched."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(need))
            is_new = need.step >= self._step and need.shard not in self._opened() | self._prefetched()
            if need.step > self._step:
                self._waiting.append(need)
            else:
                self._enter(need)
            return is_new

    def _has_room(self, need: Need) -> bool:
        if need.step <= self._step:
            return True
        if need.step > self._step + self._horizon:
            return False
        opened, prefetched = self._opened(), self._prefetched()
        size, used, taken = (
            self._shards.bytes_of(shards, self._step)
            for shards in ({need.shard} - opened - prefetched, prefetched, opened)
        )
        room = self._share - taken
        return used + size <= min(self._limit, room // 2) or (not used and size <= room)

    def _enter(self, need: Need) -> None:
        self._open[need.lane] = {need.shard} | self._open.get(need.lane, set()).intersection(need.block)

    def _opened(self) -> set[int]:
        return {shard for shards in self._open.values() for shard in shards}

    def _prefetched(self) -> set[int]:
        return {need.shard for need in self._waiting} - self._opened()
