"""The order of samples: every record once an epoch, and a pure function of its position."""

import pickle
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vavae.data.config import StreamConfig
from vavae.data.image_stream import MicroBatchKey
from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import Location, SampleOrder, assign_lanes, group_lanes, order_of
from vavae.errors import UserError
from vavae.randomness import numpy_generator

few = settings(max_examples=40, deadline=None)


@st.composite
def orders(draw):
    lanes = draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(0, 15), min_size=1, max_size=6).filter(lambda counts: sum(counts) >= lanes))
    return SampleOrder(counts, draw(st.integers(0, 2**40)), lanes, draw(st.integers(1, 12)))


def epoch_of(order, lane, epoch):
    n = order.records_per_lane
    return [order.locate(lane, position) for position in range(epoch * n, (epoch + 1) * n)]


class Locations:
    """Slices that are the list of their records."""

    def __init__(self, order, size):
        self.order, self.size = order, size

    def __getitem__(self, key):
        return key, self.order.micro_batch(key.lane, key.step, self.size)


@few
@given(orders(), st.integers(0, 3))
def test_an_epoch_repeats_nothing_and_misses_only_the_remainder(order, epoch):
    seen = [location for lane in range(order.lanes) for location in epoch_of(order, lane, epoch)]
    everything = {Location(shard, record) for shard, count in enumerate(order.counts) for record in range(count)}
    assert len(set(seen)) == len(seen)
    assert set(seen) <= everything
    assert len(everything) - len(seen) == len(everything) % order.lanes


@few
@given(orders(), st.integers(0, 3))
def test_lanes_are_ranges_of_the_permuted_shards_and_blocks_ranges_of_lanes(order, epoch):
    permuted = numpy_generator(order.seed, "shards", epoch).permutation(len(order.counts))
    records = [Location(int(shard), record) for shard in permuted for record in range(order.counts[shard])]
    n = order.records_per_lane
    for lane in range(order.lanes):
        mine, ordered = records[lane * n : (lane + 1) * n], epoch_of(order, lane, epoch)
        for start in range(0, n, order.block):
            assert set(ordered[start : start + order.block]) == set(mine[start : start + order.block])


@few
@given(orders(), st.integers(1, 9))
def test_slices_tile_a_lane_across_epochs(order, size):
    steps = 2 * order.records_per_lane // size + 1
    for lane in range(order.lanes):
        sliced = [location for step in range(steps) for location in order.micro_batch(lane, step, size)]
        whole = [location for epoch in range(2 + size) for location in epoch_of(order, lane, epoch)]
        assert sliced == whole[: len(sliced)]


@few
@given(orders(), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60)), min_size=1, max_size=30))
def test_a_location_is_a_function_of_its_position_alone(order, asked):
    asked = [(lane % order.lanes, position) for lane, position in asked]
    found = [order.locate(*place) for place in asked]
    fresh = pickle.loads(pickle.dumps(order))
    assert [fresh.locate(*place) for place in reversed(asked)] == found[::-1]


def test_epochs_lanes_and_seeds_differ():
    """One shard and lanes of one block: whatever differs, the shuffle makes it."""
    order, other = (SampleOrder([80], seed, 2, 40) for seed in (0, 1))
    first = epoch_of(order, 0, 0)
    assert first != sorted(first)
    assert first != epoch_of(order, 0, 1)
    assert first != epoch_of(other, 0, 0)
    assert first != [location._replace(record=location.record - 40) for location in epoch_of(order, 1, 0)]
    blocks = SampleOrder([80], 0, 1, 40)
    assert epoch_of(blocks, 0, 0)[:40] != [
        location._replace(record=location.record - 40) for location in epoch_of(blocks, 0, 0)[40:]
    ]


def test_epochs_permute_the_shards():
    order = SampleOrder([1] * 20, 0, 1, 1)
    assert epoch_of(order, 0, 0) != epoch_of(order, 0, 1)


@few
@given(orders(), st.integers(1, 6), st.integers(0, 40))
def test_resuming_at_a_step_equals_going_through(order, size, first):
    source, accumulation_steps = Locations(order, size), assign_lanes(order.lanes, 0, 1)
    resumed = list(islice(load_micro_batches(source, accumulation_steps, first, workers=0), 3))
    whole = list(islice(load_micro_batches(source, accumulation_steps, 0, workers=0), first + 3))
    assert resumed == whole[first:]
    assert [[key for key, _ in micro_batches] for micro_batches in resumed] == [
        [MicroBatchKey(lane, step) for lane in range(order.lanes)] for step in range(first, first + 3)
    ]


def global_batch(order, size, world_size, step):
    """Records that all ranks together learn from at a step, in the order of the lanes."""
    found = {}
    for rank in range(world_size):
        accumulation_steps = assign_lanes(order.lanes, rank, world_size)
        micro_batches = next(load_micro_batches(Locations(order, size), accumulation_steps, step, workers=0))
        found |= {
            key.lane: records
            for turn, (key, records) in zip(accumulation_steps, micro_batches, strict=True)
            if turn.weight
        }
    return [record for lane in sorted(found) for record in found[lane]]


@few
@given(orders(), st.integers(1, 5), st.integers(0, 30), st.data())
def test_a_run_that_resumes_with_another_world_size_sees_the_same_global_batches(order, size, step, data):
    sizes = st.integers(1, order.lanes)
    before, after = data.draw(sizes), data.draw(sizes)
    batches = [global_batch(order, size, 1, at) for at in (step, step + 1)]
    assert [global_batch(order, size, before, step), global_batch(order, size, after, step + 1)] == batches
    assert len(batches[0]) == order.lanes * size


@few
@given(st.integers(1, 40).flatmap(lambda lanes: st.tuples(st.just(lanes), st.integers(1, lanes))))
def test_every_world_size_gives_every_lane_once_with_an_exact_mean(sizes):
    lanes, world_size = sizes
    ranks = [assign_lanes(lanes, rank, world_size) for rank in range(world_size)]
    accumulation_steps = [turn for rank in ranks for turn in rank]
    assert {len(rank) for rank in ranks} == {-(-lanes // world_size)}
    assert Counter(turn.lane for turn in accumulation_steps if turn.weight) == Counter(range(lanes))
    for rank in ranks:
        mine = [turn.lane for turn in rank if turn.weight]
        assert mine == list(range(mine[0], mine[-1] + 1)), "a rank's lanes are contiguous"
    values = numpy_generator(0, "values", lanes).normal(size=lanes)
    mean = np.mean([turn.weight * values[turn.lane] for turn in accumulation_steps])
    np.testing.assert_allclose(mean, values.mean(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("total", [10, 65_536, 1_281_167])
@pytest.mark.parametrize("lanes", [1, 8, 32])
def test_by_default_all_lanes_together_shuffle_65536(total, lanes):
    block = order_of([total], 0, StreamConfig(lanes=min(lanes, total))).block
    assert min(total, 65_536) <= block * min(lanes, total) < min(total, 65_536) + lanes


def test_a_written_block_is_kept():
    assert order_of([100], 0, StreamConfig(lanes=2, block=7)).block == 7


def test_too_few_records_is_one_line_with_a_remedy():
    with pytest.raises(UserError, match=r"stream.lanes=4: the split has only 3 records.*lower stream.lanes"):
        SampleOrder([2, 1], 0, 4, 8)


def test_more_workers_than_lanes_is_refused():
    with pytest.raises(UserError, match=r"workers.count=5.*stream.lanes=4"):
        assign_lanes(4, 0, 5)


@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)).filter(lambda s: s[1] <= s[0]), at_once=st.integers(1, 12)
)
def test_groups_of_lanes_weigh_every_lane_alike(sizes, at_once):
    lanes, world_size = sizes
    steps = [assign_lanes(lanes, rank, world_size) for rank in range(world_size)]
    groups = [group_lanes(lanes, rank, world_size, at_once) for rank in range(world_size)]
    (passes,) = {len(of_rank) for of_rank in groups}
    share = dict.fromkeys(range(lanes), 0.0)
    for own, of_rank in zip(steps, groups, strict=True):
        for indices, weight in of_rank:
            assert 1 <= len(indices) <= at_once
            for index in indices:
                share[own[index].lane] += weight / len(indices) / (passes * world_size)
    assert [*share.values()] == pytest.approx([1 / lanes] * lanes)
    if at_once == 1:
        assert [[step.weight for step in own] for own in steps] == [[g.weight for g in of_rank] for of_rank in groups]
