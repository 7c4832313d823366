"""Slices on their way into a training process: loader processes, what these counted, shards that are fetched ahead."""

import multiprocessing
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import count
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from vavae.data.config import StreamConfig
from vavae.data.image_stream import ImageMicroBatch, ImageStream, MicroBatchKey, MicroBatchSource, ShardStream, SliceT
from vavae.data.prefetch import LookAhead
from vavae.data.sample_order import AccumulationStep
from vavae.errors import UserError
from vavae.storage.retry import COUNTERS, Counts, StorageUnavailableError


class _Keys(Sampler[MicroBatchKey]):
    """The keys of one rank from a step on, for ever: every round of a step, then the next step."""

    def __init__(self, accumulation_steps: Sequence[AccumulationStep], first_step: int) -> None:
        self._rounds, self._first = accumulation_steps, first_step

    def __iter__(self) -> Iterator[MicroBatchKey]:
        for step in count(self._first):
            for turn in self._rounds:
                yield MicroBatchKey(turn.lane, step)


def load_micro_batches(
    source: MicroBatchSource[SliceT],
    accumulation_steps: Sequence[AccumulationStep],
    first_step: int,
    workers: int,
    pin_memory: bool = False,
    prefetch_bytes: int = StreamConfig().prefetch_bytes,
    ranks: int = 1,
) -> Generator[list[SliceT], None, None]:
    """Lists of the micro-batches of one rank, one list per step from `first_step` on, one micro-batch per round.

    Args:
        source: makes a micro-batch from its key.
        accumulation_steps: the lanes of this rank.
        first_step: the step to begin with.
        workers: loader processes; 0 makes micro-batches in the training process. Their number changes nothing.
        pin_memory: for copies to a GPU that do not block.
        prefetch_bytes: see `StreamConfig`.
        ranks: how many processes of this machine train, and share the cache of shards.

    Raises:
        UserError: as the source does, in whatever process; more images are unreadable than their stream allows.
        StorageUnavailableError: as the source does.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])  # imported once for all loader processes
    loader: DataLoader[_Made] = DataLoader(
        _Maker(source),
        sampler=_Keys(accumulation_steps, first_step),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=processes if workers else None,
        pin_memory=pin_memory,
        prefetch_factor=micro_batches_ahead(source, len(accumulation_steps), workers, prefetch_bytes)
        if workers
        else None,
    )
    ahead: AbstractContextManager[LookAhead | None] = nullcontext()
    if prefetch_bytes and isinstance(source, ShardStream) and not source.shards.are_local:
        ahead = closing(LookAhead(source.shards, accumulation_steps, first_step, prefetch_bytes, ranks))
    with ahead as look_ahead:
        made = iter(loader)
        for step in count(first_step):
            if look_ahead is not None:
                look_ahead.reached(step)
            yield [_received(source, next(made)) for _ in accumulation_steps]


def micro_batches_ahead(source: MicroBatchSource[Any], accumulation_steps: int, workers: int, limit: int) -> int:
    """Slices that each loader process holds ready: those of one step, two at least, but no more bytes than allowed."""
    wanted = max(2, -(-accumulation_steps // workers))
    if isinstance(source, ShardStream):
        wanted = min(wanted, limit // (workers * source.micro_batch_bytes))
    return max(1, wanted)


class _Refusal(NamedTuple):
    kind: type[UserError] | type[StorageUnavailableError]
    message: str


class _Made(NamedTuple):
    item: Any
    """A micro-batch, or a refusal."""
    counted: Counts
    """What a loader process asked of stores for it."""


class _Maker(Dataset[_Made]):
    """A source whose errors of one line come back as values: a loader process would add its traceback to them."""

    def __init__(self, source: MicroBatchSource[Any]) -> None:
        self._source = source

    def __getitem__(self, key: MicroBatchKey) -> _Made:
        before = COUNTERS.read()
        try:
            item = self._source[key]
        except (UserError, StorageUnavailableError) as error:
            item = _Refusal(type(error), str(error))
        if get_worker_info() is None:
            return _Made(item, Counts())  # counted where it belongs
        return _Made(item, Counts(*(now - then for now, then in zip(COUNTERS.read(), before, strict=True))))


def _received(source: MicroBatchSource[Any], made: _Made) -> Any:
    COUNTERS.add(**made.counted._asdict())
    if isinstance(made.item, _Refusal):
        raise made.item.kind(made.item.message)
    if isinstance(source, ImageStream) and isinstance(made.item, ImageMicroBatch):
        source.quarantine.add(made.item.unreadable)
    return made.item
