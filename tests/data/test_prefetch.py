"""Shards are fetched before the stream needs them: in its order, within the bound, and nothing depends on it."""

import subprocess
import sys
import threading
import uuid
from contextlib import closing
from itertools import islice, takewhile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.image_shards import write_image_shards
from support.waiting import wait_until

from vavae.data.config import StreamConfig
from vavae.data.image_stream import ImageStream, ShardStream
from vavae.data.loader import load_micro_batches, prefetch_factor
from vavae.data.prefetch import THREAD, OrderedShards, ShardPrefetcher
from vavae.data.sample_order import SampleOrder, assign_lanes, order_of
from vavae.data.shards.manifest import ShardList
from vavae.errors import UserError
from vavae.storage.config import StorageOptions
from vavae.storage.storage import Storage

LANES, MICRO_BATCH, SEED = 2, 5, 4
COUNTS = (20,) * 12
STEPS = sum(COUNTS) // LANES // MICRO_BATCH
ROUNDS = assign_lanes(LANES, 0, 1)
CONFIG = StreamConfig(lanes=LANES, block=12, crop="center")


def threads():
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.fixture(scope="module")
def shards():
    """A store, and what is in it."""
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    return storage.root, write_image_shards(storage, {"train": COUNTS})


class Store:
    """The shards behind a cache of some shards, with a record of who fetched what."""

    def __init__(self, shards, cache, monkeypatch, room=100, config=CONFIG):
        (root, manifest), self.accumulation_steps = shards, assign_lanes(config.lanes, 0, 1)
        self.shard_bytes = max(info.bytes for info in manifest.splits["train"])
        self.fetched, self.blocking, self.lost, self.step = [], 0, [], 0
        self.idle_at = None
        """The step at which the prefetcher has no room for any more, once it has fetched what it had room for."""
        brought = {}
        fetch = Storage._fetch

        def noted(storage, path, *rest):
            fetch(storage, path, *rest)
            shard = int(path[-10:-4])
            if threading.current_thread().name == THREAD:
                brought[shard] = self.step
            else:
                self.blocking += 1
                if shard in brought and shard not in self.needed(brought[shard], self.step - 1):
                    self.lost.append(shard)
            self.fetched.append(shard)

        has_room = ShardPrefetcher._has_room

        def heeded(prefetcher, need):
            found = has_room(prefetcher, need)
            self.idle_at = None if found else prefetcher._step
            return found

        monkeypatch.setattr(Storage, "_fetch", noted)
        monkeypatch.setattr(ShardPrefetcher, "_has_room", heeded)
        storage = Storage(root, str(cache), StorageOptions(cache_bytes=room * self.shard_bytes))
        order = order_of([info.count for info in manifest.splits["train"]], SEED, config)
        self.stream = ImageStream(storage, manifest, "train", order, MICRO_BATCH, config, SEED)

    def micro_batches(self, ahead, first_step=0):
        limit = int(ahead * self.shard_bytes)
        return closing(
            load_micro_batches(self.stream, self.accumulation_steps, first_step, workers=0, prefetch_bytes=limit)
        )

    def prefetcher(self, limit=1 << 30):
        return closing(ShardPrefetcher(self.stream.shards, self.accumulation_steps, 0, limit))

    def wait_for_prefetcher(self, step):
        """Until it has done all that it may while the stream is at a step."""
        wait_until(lambda: self.idle_at == step)

    def needed(self, first_step, last_step):
        """Shards of the records of some steps; none where the last is before the first."""
        keys = [
            (accumulation_step.lane, step)
            for step in range(first_step, last_step + 1)
            for accumulation_step in self.accumulation_steps
        ]
        return {location.shard for key in keys for location in self.stream.shards.order.micro_batch(*key, MICRO_BATCH)}


@pytest.fixture
def store(shards, tmp_path, monkeypatch):
    return Store(shards, tmp_path / "cache", monkeypatch)


@st.composite
def ordered_shards(draw):
    lanes = draw(st.integers(1, 5))
    counts = draw(st.lists(st.integers(0, 15), min_size=1, max_size=8).filter(lambda counts: sum(counts) >= lanes))
    order = SampleOrder(counts, draw(st.integers(0, 2**40)), lanes, draw(st.integers(1, 12)))
    return OrderedShards(Storage("nowhere"), "train", ShardList([]), order, draw(st.integers(1, 7)))


@settings(max_examples=60, deadline=None)
@given(ordered_shards(), st.integers(0, 30), st.data())
def test_needs_are_what_the_slices_read_and_come_once_an_epoch(shards, first_step, data):
    order, size = shards.order, shards.micro_batch_size
    accumulation_steps = assign_lanes(order.lanes, 0, data.draw(st.integers(1, order.lanes)))
    steps = 2 * order.records_per_lane // size + 2
    needs = list(takewhile(lambda need: need.step < first_step + steps, shards.needs(accumulation_steps, first_step)))
    assert [need.step for need in needs] == sorted(need.step for need in needs)
    for lane in {accumulation_step.lane for accumulation_step in accumulation_steps}:
        mine = [need for need in needs if need.lane == lane]
        for step in range(first_step, first_step + steps):
            entered = [need for need in mine if need.step <= step]
            now = {location.shard for location in order.micro_batch(lane, step, size)}
            assert now <= {need.shard for need in entered}
        assert all(need.shard in need.block for need in mine)
        n = order.records_per_lane
        epochs = range(first_step * size // n, (first_step + steps) * size // n + 1)
        of_epochs = [{order.locate(lane, position).shard for position in range(e * n, (e + 1) * n)} for e in epochs]
        assert len(mine) <= sum(map(len, of_epochs))


def test_the_stream_finds_its_shards_in_the_cache(store):
    """Each step lasts until the store has brought what the next one needs: with prefetching nobody waits after that."""
    with store.micro_batches(ahead=3) as micro_batches:
        for step, _ in enumerate(islice(micro_batches, 2 * STEPS)):
            if step == 0:
                at_first = store.blocking
            wait_until(lambda step=step: store.needed(0, step + 1) <= set(store.fetched))
        assert store.blocking == at_first <= len(store.needed(0, 0))
    assert len(store.fetched) == len(set(store.fetched)) == len(COUNTS)


def test_without_it_every_shard_is_waited_for(store):
    with store.micro_batches(ahead=0) as micro_batches:
        list(islice(micro_batches, STEPS))
        assert not threads()
    assert store.blocking == len(store.fetched) == len(COUNTS)


@pytest.mark.parametrize("ahead", [0.5, 1, 2.5])
def test_no_more_is_ahead_than_allowed_but_always_the_next_shard(store, ahead):
    with store.prefetcher(int(ahead * store.shard_bytes)) as prefetcher:
        most = max(1, int(ahead))
        needs = list(takewhile(lambda need: need.step < STEPS, store.stream.shards.needs(ROUNDS, 0)))
        for step in range(STEPS):
            prefetcher.reached(step)
            entered = {need.shard for need in needs if need.step <= step}
            expected = min(len(COUNTS), len(entered) + most)
            store.wait_for_prefetcher(step)
            assert len(set(store.fetched)) == expected
    assert store.blocking == 0


@pytest.mark.parametrize(("lanes", "room"), [(1, 8), (2, 5), (2, 6), (2, 8)])
def test_a_small_cache_is_not_thrashed(shards, tmp_path, monkeypatch, lanes, room):
    """A lane has up to two shards open."""
    config = CONFIG.model_copy(update={"lanes": lanes})
    store, epochs = Store(shards, tmp_path / "cache", monkeypatch, room, config), 4
    with store.micro_batches(ahead=100) as micro_batches:
        for store.step in range(epochs * STEPS * LANES // lanes):
            next(micro_batches)
            store.wait_for_prefetcher(store.step)
    wait_until(lambda: not threads())
    assert not store.lost, "dropped between fetch and use"
    assert len(COUNTS) < len(store.fetched) <= epochs * len(COUNTS) + room


def test_a_cache_without_room_is_not_filled_ahead(shards, tmp_path, monkeypatch):
    store = Store(shards, tmp_path / "cache", monkeypatch, room=2)
    with store.prefetcher():
        store.wait_for_prefetcher(0)
        assert set(store.fetched) == store.needed(0, 0)


def test_what_the_stream_has_passed_is_not_fetched(store, monkeypatch):
    slow, passed, fetch = threading.Event(), STEPS // 2, Storage._fetch
    monkeypatch.setattr(Storage, "_fetch", lambda *arguments: slow.wait(10) and fetch(*arguments))
    with store.prefetcher() as prefetcher:
        prefetcher.reached(passed)
        slow.set()
        needed = store.needed(passed, STEPS - 1)
        wait_until(lambda: needed <= set(store.fetched))
        over = store.needed(0, passed - 1) - needed
        # Behind them comes the next epoch, which needs all shards.
        until = max(store.fetched.index(shard) for shard in needed)
        assert len(over & set(store.fetched[:until])) <= 1 < len(over)


def test_what_is_open_is_not_fetched_again(tmp_path, monkeypatch):
    """Both lanes stay in the only shard, which the cache drops while it is mapped."""
    place = Storage(f"memory://{uuid.uuid4().hex}")
    store = Store((place.root, write_image_shards(place, {"train": (40,)})), tmp_path, monkeypatch)
    with store.prefetcher() as prefetcher:
        wait_until(lambda: prefetcher._waiting)  # for the next epoch, so the shard is here
        store.stream.shards.open(0, Path.unlink)
        for step in range(12):
            prefetcher.reached(step)
            store.wait_for_prefetcher(step)
    assert store.fetched == [0]


def test_the_thread_ends_with_the_stream(store):
    with store.micro_batches(ahead=1) as micro_batches:
        next(micro_batches)
        assert len(threads()) == 1
        assert threads()[0].daemon
    wait_until(lambda: not threads())
    micro_batches = load_micro_batches(store.stream, ROUNDS, 0, workers=0, prefetch_bytes=1)
    next(micro_batches)
    del micro_batches
    wait_until(lambda: not threads())


_LEAVES = """
import sys, threading, time
from vavae.storage.storage import Storage
storage, started = Storage("memory://x", sys.argv[1]), threading.Event()
storage.write_bytes("shard", b"x")
Storage.read_range = lambda *arguments: started.set() or time.sleep(60)
threading.Thread(target=storage.local_file, args=("shard",), daemon=True).start()
assert started.wait(60)
"""


def test_a_fetch_under_way_keeps_no_process_alive(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", _LEAVES, str(tmp_path)])
    assert process.wait(timeout=50) == 0


def test_local_shards_have_no_thread(storage):
    manifest = write_image_shards(storage, {"train": COUNTS})
    stream = ImageStream(storage, manifest, "train", order_of(COUNTS, SEED, CONFIG), MICRO_BATCH, CONFIG, SEED)
    with closing(load_micro_batches(stream, ROUNDS, 0, workers=0)) as micro_batches:
        next(micro_batches)
        assert not threads()


def test_errors_are_the_streams(store, monkeypatch):
    """A shard that is gone ends the stream where it is needed and not before."""
    needs = store.stream.shards.needs(ROUNDS, 0)
    gone = next(need for need in needs if need.step > 3 and need.shard not in store.needed(0, need.step - 1))
    fetch = Storage._fetch

    def fail(storage, path, *rest):
        if path == f"train/{gone.shard:06d}.tar":
            raise FileNotFoundError(path)
        fetch(storage, path, *rest)

    monkeypatch.setattr(Storage, "_fetch", fail)
    with store.prefetcher():
        wait_until(lambda: len(store.fetched) == len(COUNTS) - 1)
    with store.micro_batches(ahead=4) as micro_batches:
        list(islice(micro_batches, gone.step))
        with pytest.raises(UserError, match=f"{gone.shard:06d}.tar is gone"):
            list(islice(micro_batches, CONFIG.block))
    wait_until(lambda: not threads())


def test_loader_processes_hold_as_many_slices_as_fit(tmp_path):
    stream = ShardStream(
        OrderedShards(Storage(str(tmp_path)), "train", ShardList([]), None, MICRO_BATCH), micro_batch_bytes=100
    )
    held = [prefetch_factor(stream, 16, 2, limit) for limit in (0, 199, 400, 1000, 10_000)]
    assert held == [1, 1, 2, 5, 8]
    assert prefetch_factor(stream, 1, 4, 10_000) == 2


def test_a_shard_that_the_cache_drops_before_it_is_open_is_fetched_again(store):
    shards = store.stream.shards
    tries = []

    def open_file(path):
        tries.append(path)
        if len(tries) < 3:
            path.unlink()
        return path.read_bytes()

    assert len(shards.open(0, open_file)) == shards.infos[0].bytes
    assert store.fetched == [0, 0, 0]

    def drop(path):
        path.unlink()
        path.read_bytes()

    with pytest.raises(UserError, match=r"storage.cache_bytes=[\d,]+ is too small: train/000001.tar was dropped"):
        shards.open(1, drop)
