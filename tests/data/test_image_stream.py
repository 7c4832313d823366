"""The image stream: micro-batches are functions of (lane, step), whoever reads them."""

import dataclasses
import logging
import pickle
import uuid
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import image_shards
from support.image_shards import write_image_shards

from vavae.data.config import RecordKeys, StreamConfig
from vavae.data.image import center_crop_resize, decode_image, encode_image
from vavae.data.image_stream import ImageStream, MicroBatchKey
from vavae.data.loader import load_micro_batches
from vavae.data.record import RecordReader, find_image
from vavae.data.sample_order import Location, assign_lanes, order_of
from vavae.data.shards.manifest import Manifest, ShardInfo
from vavae.data.shards.tar import write_tar
from vavae.errors import UserError
from vavae.storage.retry import StorageUnavailableError
from vavae.storage.storage import Storage, sha256_of

COUNTS, MICRO_BATCH, SEED = (5, 4, 5), 3, 11
CENTER = StreamConfig(lanes=2, block=4, crop="center")
KEYS = [MicroBatchKey(lane, step) for step in range(6) for lane in (0, 1)]


def stream_of(storage, config=CENTER, height=image_shards.SIZE, width=image_shards.SIZE, damaged=()):
    manifest = write_image_shards(storage, {"train": COUNTS}, height, width, damaged)
    order = order_of(COUNTS, SEED, config)
    return ImageStream(storage, manifest, "train", order, MICRO_BATCH, config, SEED), order


def index_of(location):
    return sum(COUNTS[: location.shard]) + location.record


def same(left, right):
    return (left.lane, left.step) == (right.lane, right.step) and all(
        torch.equal(a, b) for a, b in zip(left[2:4], right[2:4], strict=True)
    )


def test_a_slice_holds_the_records_of_the_order(storage):
    stream, order = stream_of(storage)
    for key in KEYS:
        found, indices = stream[key], [index_of(location) for location in order.micro_batch(*key, MICRO_BATCH)]
        expected = np.stack([image_shards.image("train", index) for index in indices])
        assert (found.lane, found.step) == key
        assert np.array_equal(found.images.permute(0, 2, 3, 1), expected)
        assert found.labels.tolist() == [image_shards.label_of(index) for index in indices]
        assert (found.images.dtype, found.labels.dtype) == (torch.uint8, torch.int64)
        assert found.images.is_contiguous(memory_format=torch.channels_last), "whoever makes floats reorders them once"


def test_crops_and_flips_are_keyed_by_the_slice_and_not_by_the_reader(storage):
    config = CENTER.model_copy(update={"crop": "random", "flip": True, "open_shards": 1})
    stream, _ = stream_of(storage, config, height=11, width=13)
    forward = {key: stream[key] for key in KEYS}
    other = pickle.loads(pickle.dumps(stream))
    assert all(same(other[key], forward[key]) for key in reversed(KEYS))


class OneImage:
    """An order of one record."""

    def micro_batch(self, lane, step, size):
        return [Location(0, 0)] * size


def test_every_lane_and_step_has_its_own_crops(storage):
    manifest = write_image_shards(storage, {"train": (1,)}, height=8, width=4000)
    stream = ImageStream(storage, manifest, "train", OneImage(), 2, StreamConfig(), SEED)
    crops = [
        image.numpy().tobytes()
        for lane in (0, 1)
        for step in range(3)
        for image in stream[MicroBatchKey(lane, step)].images
    ]
    assert len(set(crops)) == len(crops) == 12


def test_half_of_the_images_are_mirrored(storage):
    manifest = write_image_shards(storage, {"train": (1,)})
    stream = ImageStream(storage, manifest, "train", OneImage(), 200, CENTER.model_copy(update={"flip": True}), SEED)
    image = torch.from_numpy(image_shards.image("train", 0)).permute(2, 0, 1)
    seen = stream[MicroBatchKey(0, 0)].images
    mirrored = [torch.equal(found, image.flip(-1)) for found in seen]
    assert all(mirror or torch.equal(found, image) for mirror, found in zip(mirrored, seen, strict=True))
    assert 70 < sum(mirrored) < 130


@pytest.mark.parametrize("crop", ["center", "random"])
def test_files_that_are_decoded_in_place_are_mirrored_alike(storage, crop):
    files = [
        encode_image(Image.fromarray(image_shards.image("train", index, 16, 16)), "jpeg").data for index in range(2)
    ]
    with storage.create("train/000000.tar") as local:
        with write_tar(local) as tar:
            for index, data in enumerate(files):
                tar.add(index, {"jpg": data, "cls": b"0"})
        info = ShardInfo(name="000000.tar", count=2, bytes=local.stat().st_size, sha256=sha256_of(local))
    manifest = Manifest(splits={"train": (info,)}, classes=("a",), image_size=16, sources={})
    config = CENTER.model_copy(update={"lanes": 1, "crop": crop, "flip": True})
    order = order_of((2,), SEED, config)
    stream = ImageStream(storage, manifest, "train", order, 40, config, SEED)
    mirrored = 0
    for image, location in zip(stream[MicroBatchKey(0, 0)].images, order.micro_batch(0, 0, 40), strict=True):
        pixels = torch.from_numpy(decode_image(files[location.record])).permute(2, 0, 1)
        mirrored += torch.equal(image, pixels.flip(-1))
        assert torch.equal(image, pixels) or torch.equal(image, pixels.flip(-1))
    assert 10 < mirrored < 30


@pytest.mark.parametrize("crop", ["center", "random", "random_resized"])
def test_originals_come_at_the_size_of_training(storage, crop):
    config = CENTER.model_copy(update={"crop": crop})
    stream, order = stream_of(storage, config, height=40, width=29)
    found = stream[MicroBatchKey(1, 2)]
    assert found.images.shape == (MICRO_BATCH, 3, image_shards.SIZE, image_shards.SIZE)
    if crop == "center":
        pixels = [
            image_shards.image("train", index_of(location), 40, 29)
            for location in order.micro_batch(*MicroBatchKey(1, 2), size=MICRO_BATCH)
        ]
        expected = [np.asarray(center_crop_resize(Image.fromarray(image), image_shards.SIZES)) for image in pixels]
        assert np.array_equal(found.images.permute(0, 2, 3, 1), np.stack(expected))


def test_the_next_readable_image_of_the_shard_stands_in_for_a_damaged_one(storage, caplog):
    damaged = [("train", index) for index in (7, 8)]  # the last two of the second shard: the first stands in
    stream, order = stream_of(storage, damaged=damaged)
    with caplog.at_level(logging.WARNING):
        for key in KEYS:
            found = stream[key]
            for row, location in enumerate(order.micro_batch(*key, MICRO_BATCH)):
                index = 5 if index_of(location) in (7, 8) else index_of(location)
                assert np.array_equal(found.images[row].permute(1, 2, 0), image_shards.image("train", index))
                assert found.labels[row] == image_shards.label_of(index)
    assert "train/000001.tar" in caplog.text


def test_a_shard_without_a_readable_image_is_an_error(storage):
    stream, _ = stream_of(storage, damaged=[("train", index) for index in range(sum(COUNTS))])
    with pytest.raises(UserError, match=r"train/00000\d.tar: no readable image"):
        stream[MicroBatchKey(0, 0)]


def test_a_shard_of_another_length_than_the_manifest_says_is_an_error(storage):
    stream, _ = stream_of(storage)
    write_image_shards(storage, {"train": (2, 2, 2)})
    with pytest.raises(UserError, match=r"train/00000\d.tar: \d+ bytes where the manifest says \d+"):
        stream[MicroBatchKey(0, 0)]


def test_a_manifest_that_counts_otherwise_is_an_error(storage):
    stream, _ = stream_of(storage)
    infos = [shard.model_copy(update={"count": 9}) for shard in stream.shards.infos]
    stream.shards = dataclasses.replace(stream.shards, infos=infos)
    with pytest.raises(UserError, match=r"train/00000\d.tar: [45] records where the manifest says 9"):
        stream[MicroBatchKey(0, 0)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanished_is_one_line_from_any_process(storage, workers):
    stream, _ = stream_of(storage)
    for number in range(len(COUNTS)):
        storage.delete(f"train/{number:06d}.tar")
    with pytest.raises(UserError, match=r"train/00000\d.tar is gone, but the manifest names it") as caught:
        next(load_micro_batches(stream, assign_lanes(2, 0, 1), 0, workers))
    assert "\n" not in str(caught.value)


class Unreachable:
    """A source behind a store that gives no answer."""

    def __getitem__(self, key):
        raise StorageUnavailableError("s3://bucket/shard: no answer")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_outage_is_the_same_one_line_from_any_process(workers):
    with pytest.raises(StorageUnavailableError) as caught:
        next(load_micro_batches(Unreachable(), assign_lanes(2, 0, 1), 0, workers))
    assert str(caught.value) == "s3://bucket/shard: no answer"


def test_unreadable_images_are_counted_and_named_up_to_a_limit(storage):
    damaged = [("train", index) for index in (1, 7)]
    names = {"train/000000.tar#000000001", "train/000001.tar#000000007"}
    stream, order = stream_of(storage, damaged=damaged)
    epoch = -(-order.records_per_lane // MICRO_BATCH)
    for _ in range(2):  # going through it again names no image twice
        list(islice(load_micro_batches(stream, assign_lanes(2, 0, 1), 0, workers=0), epoch))
        assert stream.quarantine.names == names
    strict, _ = stream_of(storage, CENTER.model_copy(update={"unreadable_limit": 1}), damaged=damaged)
    with pytest.raises(UserError, match=r"2 unreadable images, such as train/0.*: more than stream.unreadable_limit=1"):
        list(islice(load_micro_batches(strict, assign_lanes(2, 0, 1), 0, workers=0), epoch))


@pytest.mark.parametrize("text", [b"", b"dog", b"-1", b"1.5"])
def test_a_class_that_is_no_index_is_an_error(text):
    reader = RecordReader(RecordKeys(), "abc")
    with pytest.raises(UserError, match=r"here: its class is b?'.*'; expected"):
        reader.label({"cls": text}, "here")
    assert reader.label({"cls": b"2\n"}, "here") == 2


def test_resuming_opens_the_current_blocks_alone(storage):
    """40 shards of 4 records, 2 lanes of blocks of 8: a block lies in at most three shards."""
    counts, config = (4,) * 40, StreamConfig(lanes=2, block=8, crop="center")
    manifest = write_image_shards(storage, {"train": counts})
    order, opened = order_of(counts, SEED, config), []

    class Counting(ImageStream):
        def _map(self, shard):
            opened.append(shard)
            return super()._map(shard)

    for step in (0, 5, 19, 33):  # blocks begin at multiples of 8 = 2 micro-batches of 4; step 20 begins an epoch
        opened.clear()
        stream = Counting(storage, manifest, "train", order, 4, config, SEED)
        next(load_micro_batches(stream, assign_lanes(2, 0, 1), step, workers=0))
        assert 1 <= len(opened) <= 2 * 3
        assert len(set(opened)) == len(opened)


def test_a_label_beyond_the_classes_is_an_error(storage):
    manifest = write_image_shards(storage, {"train": COUNTS}).model_copy(update={"classes": ("a",)})
    stream = ImageStream(storage, manifest, "train", order_of(COUNTS, SEED, CENTER), 14, CENTER, SEED)
    with pytest.raises(UserError, match=r"train/00000\d.tar#\d+: label [12], but the manifest has 1 classes"):
        stream[MicroBatchKey(0, 0)]


def test_a_record_without_an_image_names_what_there_is():
    with pytest.raises(UserError, match=r"\['cls', 'txt'\]; expected png, jpg, jpeg or webp"):
        find_image({"txt": b"", "cls": b"1"})
    assert find_image({"cls": b"1", "jpg": b"x"}) == "jpg"


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_world_size_sees_the_same_slices(storage, world_size):
    stream, _ = stream_of(storage)
    for rank in range(world_size):
        accumulation_steps = assign_lanes(CENTER.lanes, rank, world_size)
        for step, micro_batches in enumerate(
            islice(load_micro_batches(stream, accumulation_steps, 2, workers=0), 3), 2
        ):
            assert [(found.lane, found.step) for found in micro_batches] == [
                (turn.lane, step) for turn in accumulation_steps
            ]
            assert all(same(found, stream[MicroBatchKey(found.lane, step)]) for found in micro_batches)


def test_loader_processes_change_nothing(storage):
    config = CENTER.model_copy(update={"crop": "random", "flip": True})
    stream, _ = stream_of(storage, config, height=10, width=10)
    accumulation_steps = assign_lanes(config.lanes, 0, 1)
    here, there = (list(islice(load_micro_batches(stream, accumulation_steps, 1, workers), 3)) for workers in (0, 2))
    assert all(same(a, b) for left, right in zip(here, there, strict=True) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def cropped(tmp_path_factory):
    """A stream of three lanes that crops and flips."""
    config = StreamConfig(lanes=3, block=4, crop="random", flip=True)
    return stream_of(Storage(str(tmp_path_factory.mktemp("shards"))), config, height=10, width=10)[0]


def global_batches(stream, world_size, steps, workers):
    """Micro-batches that all ranks together learn from: those of each step in the order of the lanes."""
    lanes = {step: {} for step in steps}
    for rank in range(world_size):
        accumulation_steps = assign_lanes(stream.shards.order.lanes, rank, world_size)
        with closing(load_micro_batches(stream, accumulation_steps, steps.start, workers)) as micro_batches:
            for step, found in zip(steps, micro_batches, strict=False):
                lanes[step] |= {
                    item.lane: item for turn, item in zip(accumulation_steps, found, strict=True) if turn.weight
                }
    return [[lanes[step][lane] for lane in sorted(lanes[step])] for step in steps]


def check_resumed(stream, before, after, step, workers):
    """Three steps by some ranks and two by others are the five steps of one rank that reads them by itself."""
    there = global_batches(stream, before, range(step, step + 3), workers)
    there += global_batches(stream, after, range(step + 3, step + 5), workers)
    lanes = range(stream.shards.order.lanes)
    for found, at in zip(there, range(step, step + 5), strict=True):
        assert len(found) == len(lanes)
        assert all(same(item, stream[MicroBatchKey(lane, at)]) for lane, item in zip(lanes, found, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 12))
def test_a_stream_resumed_under_another_world_size_gives_the_same_global_batches(cropped, before, after, step):
    check_resumed(cropped, before, after, step, workers=0)


@settings(max_examples=2, deadline=None)
@given(st.sampled_from([(1, 2), (2, 1), (1, 3)]), st.integers(0, 12))
def test_so_it_does_with_loader_processes(cropped, world_sizes, step):
    check_resumed(cropped, *world_sizes, step, workers=2)


def test_shards_of_a_store_are_fetched_once_and_checked_then(tmp_path, monkeypatch):
    storage, fetched = Storage(f"memory://{uuid.uuid4().hex}", str(tmp_path / "cache")), []
    fetch = Storage._fetch
    monkeypatch.setattr(Storage, "_fetch", lambda self, path, *rest: fetched.append(path) or fetch(self, path, *rest))
    config = CENTER.model_copy(update={"open_shards": 1})
    manifest, order = write_image_shards(storage, {"train": COUNTS}), order_of(COUNTS, SEED, config)
    stream = ImageStream(storage, manifest, "train", order, MICRO_BATCH, config, SEED)
    for key in KEYS:
        indices = [index_of(location) for location in order.micro_batch(*key, MICRO_BATCH)]
        assert stream[key].labels.tolist() == [image_shards.label_of(index) for index in indices]
    assert sorted(fetched) == [f"train/{number:06d}.tar" for number in range(len(COUNTS))]
    other = Storage(storage.root, str(tmp_path / "other"))
    for number in range(len(COUNTS)):
        data = bytearray(storage.read_bytes(f"train/{number:06d}.tar"))
        data[700] ^= 1
        storage.write_bytes(f"train/{number:06d}.tar", data)
    damaged = ImageStream(other, manifest, "train", order, MICRO_BATCH, config, SEED)
    with pytest.raises(UserError, match=r"train/00000\d.tar"):
        damaged[KEYS[0]]
    assert stream[KEYS[0]].labels.shape == (MICRO_BATCH,), "what is in the cache stays good"
