"""Passes in shard order."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from support import image_shards
from support.image_shards import write_image_shards

from vavae.data import shard_reader
from vavae.data.image import center_crop_resize, prepare_image
from vavae.data.shard_reader import gather, read_images, read_span
from vavae.errors import UserError

COUNTS = (4, 3)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("limit", [1, 5, 7, 100])
def test_the_first_images_in_order_whatever_the_batch(storage, limit, batch_size):
    manifest = write_image_shards(storage, {"validation": COUNTS})
    batches = list(read_images(storage, manifest, "validation", limit, batch_size))
    count = min(limit, sum(COUNTS))
    assert [len(batch.images) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    found = gather(batches)
    expected = np.stack([image_shards.image("validation", index) for index in range(count)])
    assert np.array_equal(found.images.permute(0, 2, 3, 1), expected)
    assert found.labels.tolist() == [image_shards.label_of(index) for index in range(count)]
    assert (found.images.dtype, found.labels.dtype) == (torch.uint8, torch.int64)


@pytest.mark.parametrize("batch_size", [2, 50])
@pytest.mark.parametrize("span", [range(0, 7), range(2, 4), range(3, 6), range(4, 7), range(6, 7), range(1, 99)])
def test_a_span_of_records_is_read_through_the_shards(storage, span, batch_size):
    manifest = write_image_shards(storage, {"validation": COUNTS})
    found = gather(read_span(storage, manifest, "validation", span, batch_size))
    expected = np.stack([image_shards.image("validation", index) for index in span if index < sum(COUNTS)])
    assert np.array_equal(found.images.permute(0, 2, 3, 1), expected)


def test_spans_side_by_side_share_no_image_though_one_cannot_be_read(storage):
    manifest = write_image_shards(storage, {"validation": COUNTS}, damaged=[("validation", 1)])
    first, second = (gather(read_span(storage, manifest, "validation", s, 9)) for s in (range(3), range(3, 7)))
    expected = np.stack([image_shards.image("validation", index) for index in (0, 2, 3, 4, 5, 6)])
    assert np.array_equal(torch.cat([first.images, second.images]).permute(0, 2, 3, 1), expected)


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_neither_images_nor_batches_nor_what_is_left_out(storage, caplog, threads):
    damaged = [("validation", index) for index in (1, 4)]
    manifest = write_image_shards(storage, {"validation": COUNTS}, damaged=damaged)
    batches = list(read_images(storage, manifest, "validation", 9, 2, threads))
    expected = np.stack([image_shards.image("validation", index) for index in (0, 2, 3, 5, 6)])
    assert [len(batch.images) for batch in batches] == [2, 2, 1]
    assert np.array_equal(gather(batches).images.permute(0, 2, 3, 1), expected)
    assert [record.args[0] for record in caplog.records] == [
        "validation/000000.tar#000000001",
        "validation/000001.tar#000000004",
    ]


def test_a_batch_is_decoded_while_the_one_before_is_used(storage, monkeypatch):
    """Across the end of a shard, too."""
    decoded = threading.Semaphore(0)

    def decode(*arguments, **options):
        decoded.release()
        return prepare_image(*arguments, **options)

    monkeypatch.setattr(shard_reader, "prepare_image", decode)
    manifest = write_image_shards(storage, {"validation": COUNTS})
    batches = read_span(storage, manifest, "validation", range(7), 2)
    for _ in range(3):
        next(batches)
        assert decoded.acquire(timeout=30)
        assert decoded.acquire(timeout=30), "of the batch"
    assert decoded.acquire(timeout=30), "of the next batch"


def test_larger_images_are_cut_as_adm_cuts_them(storage):
    manifest = write_image_shards(storage, {"validation": (1,)}, height=33, width=20)
    (batch,) = read_images(storage, manifest, "validation", 1, 1)
    expected = center_crop_resize(
        Image.fromarray(image_shards.image("validation", 0, 33, 20)), (image_shards.SIZE, image_shards.SIZE)
    )
    assert np.array_equal(batch.images[0].permute(1, 2, 0), np.asarray(expected))


def test_a_shard_with_fewer_images_than_promised_is_an_error(storage):
    manifest = write_image_shards(storage, {"validation": COUNTS})
    write_image_shards(storage, {"validation": (2, 3)})
    with pytest.raises(UserError, match=r"validation/000000.tar: \d+ bytes where the manifest says \d+"):
        list(read_images(storage, manifest, "validation", 100, 2))


@pytest.mark.parametrize("garbage", [b"", b"no image"])
def test_unreadable_images_are_left_out_and_named(storage, caplog, garbage):
    manifest = write_image_shards(storage, {"validation": COUNTS}, damaged=[("validation", 1)], garbage=garbage)
    found = gather(read_images(storage, manifest, "validation", 3, 2))
    expected = np.stack([image_shards.image("validation", index) for index in (0, 2, 3)])
    assert np.array_equal(found.images.permute(0, 2, 3, 1), expected)
    assert "validation/000000.tar#000000001: left out" in caplog.text


def test_nothing_readable_and_classes_beyond_the_manifest_are_errors(storage):
    bad = [("validation", 0), ("validation", 1)]
    manifest = write_image_shards(storage, {"validation": (2,)}, damaged=bad)
    with pytest.raises(UserError, match=r"validation: no readable image in all its shards"):
        list(read_images(storage, manifest, "validation", 3, 2))
    manifest = write_image_shards(storage, {"validation": COUNTS}).model_copy(update={"classes": ("a", "b")})
    with pytest.raises(UserError, match=r"validation/000000.tar#000000002: label 2, but the manifest has 2 classes"):
        list(read_images(storage, manifest, "validation", 3, 2))
