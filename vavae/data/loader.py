"""Loading of micro-batches into a training process: loader processes, their counters, prefetched shards."""

import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from itertools import count
from types import ModuleType
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from vavae.data.config import StreamConfig
from vavae.data.image_stream import (
    ImageMicroBatch,
    ImageStream,
    MicroBatchKey,
    MicroBatchSource,
    MicroBatchT,
    ShardStream,
)
from vavae.data.prefetch import ShardPrefetcher
from vavae.data.sample_order import AccumulationStep
from vavae.errors import UserError
from vavae.storage.retry import COUNTERS, Counts, StorageUnavailableError
from vavae.storage.scratch import SHORT_FOLDER, holds_sockets

_SOCKET_NAME_BYTES = 32
"""Longest name that multiprocessing gives to a socket below the temporary folder: `pymp-xxxxxxxx/listener-xxxxxxxx`."""


class _Keys(Sampler[MicroBatchKey]):
    """Keys of one rank from a step on, without end: every accumulation step of a step, then the next step."""

    def __init__(self, accumulation_steps: Sequence[AccumulationStep], first_step: int) -> None:
        self._accumulation_steps, self._first = accumulation_steps, first_step

    def __iter__(self) -> Iterator[MicroBatchKey]:
        for step in count(self._first):
            for accumulation_step in self._accumulation_steps:
                yield MicroBatchKey(accumulation_step.lane, step)


def load_micro_batches(
    source: MicroBatchSource[MicroBatchT],
    accumulation_steps: Sequence[AccumulationStep],
    first_step: int,
    workers: int,
    pin_memory: bool = False,
    prefetch_bytes: int = StreamConfig().prefetch_bytes,
    ranks: int = 1,
) -> Generator[list[MicroBatchT], None, None]:
    """Yield the micro-batches of one rank: a list per step from `first_step` on, one micro-batch per accumulation step.

    Args:
        source: makes a micro-batch from its key; with loader processes, of a class of an importable module.
        accumulation_steps: the lanes of this rank.
        first_step: the step to begin with.
        workers: loader processes; 0 makes micro-batches in the training process. Their number changes nothing.
        pin_memory: for copies to a GPU that do not block.
        prefetch_bytes: most bytes fetched or loaded ahead; see `StreamConfig`.
        ranks: how many processes of this machine train, and share the cache of shards.

    Raises:
        UserError: as the source does, in whatever process; more images are unreadable than their stream allows.
        StorageUnavailableError: as the source does.
    """
    if workers:
        _keep_sockets_where_they_fit()
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])  # imported once for all loader processes
    loader: DataLoader[_Loaded] = DataLoader(
        _LoaderDataset(source),
        sampler=_Keys(accumulation_steps, first_step),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=processes if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_live_as_long_as_the_training_process,
        prefetch_factor=prefetch_factor(source, len(accumulation_steps), workers, prefetch_bytes) if workers else None,
    )
    context: AbstractContextManager[ShardPrefetcher | None] = nullcontext()
    if prefetch_bytes and isinstance(source, ShardStream) and not source.shards.are_local:
        context = closing(ShardPrefetcher(source.shards, accumulation_steps, first_step, prefetch_bytes, ranks))
    with context as prefetcher:
        with _main_module_left_out():
            loaded = iter(loader)
        for step in count(first_step):
            if prefetcher is not None:
                prefetcher.reached(step)
            yield [_unwrap(source, next(loaded)) for _ in accumulation_steps]


def _keep_sockets_where_they_fit() -> None:
    """Let multiprocessing put its sockets into a short folder where the temporary one is too long for their paths."""
    if not holds_sockets(tempfile.gettempdir(), _SOCKET_NAME_BYTES):
        before, tempfile.tempdir = tempfile.tempdir, SHORT_FOLDER
        try:
            multiprocessing.util.get_temp_dir()  # which it makes once, for this process and those that it starts
        finally:
            tempfile.tempdir = before


@contextmanager
def _main_module_left_out() -> Iterator[None]:
    """Start processes without the main module, which each would import again: that of a Ray worker imports Ray."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _live_as_long_as_the_training_process(worker: int) -> None:
    """Prepare a loader process: Ctrl-C does not end it before its training process, and it does not outlive that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a training saves a checkpoint first, and may need data until then
    training_process = multiprocessing.parent_process()
    assert training_process is not None, "loader processes are started by multiprocessing"

    def end_with_it() -> None:
        training_process.join()
        os._exit(1)

    # torch looks whether the process that forked this one is alive: the fork server, which lives as long as its forks.
    threading.Thread(target=end_with_it, daemon=True).start()


def prefetch_factor(source: MicroBatchSource[Any], accumulation_steps: int, workers: int, limit: int) -> int:
    """Micro-batches that each loader process holds ready: those of one step, two at least, within `limit` bytes."""
    wanted = max(2, -(-accumulation_steps // workers))
    if isinstance(source, ShardStream):
        wanted = min(wanted, limit // (workers * source.micro_batch_bytes))
    return max(1, wanted)


class _Failure(NamedTuple):
    kind: type[UserError] | type[StorageUnavailableError]
    message: str


class _Loaded(NamedTuple):
    item: Any
    """A micro-batch, or a failure."""
    counted: Counts
    """Requests to stores that a loader process made for it."""


class _LoaderDataset(Dataset[_Loaded]):
    """A source whose user errors come back as values: a loader process would add its traceback to them."""

    def __init__(self, source: MicroBatchSource[Any]) -> None:
        self._source = source

    def __getitem__(self, key: MicroBatchKey) -> _Loaded:
        before = COUNTERS.read()
        try:
            item = self._source[key]
        except (UserError, StorageUnavailableError) as error:
            item = _Failure(type(error), str(error))
        if get_worker_info() is None:
            return _Loaded(item, Counts())  # counted where it belongs
        return _Loaded(item, Counts(*(now - then for now, then in zip(COUNTERS.read(), before, strict=True))))


def _unwrap(source: MicroBatchSource[Any], loaded: _Loaded) -> Any:
    COUNTERS.add(**loaded.counted._asdict())
    if isinstance(loaded.item, _Failure):
        raise loaded.item.kind(loaded.item.message)
    if isinstance(source, ImageStream) and isinstance(loaded.item, ImageMicroBatch):
        source.quarantine.add(loaded.item.unreadable)
    return loaded.item
