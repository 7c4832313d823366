"""Passes in shard order."""

import numpy as np
import pytest
import torch
from PIL import Image
from support import small

from vavae.data.image import center_crop_resize
from vavae.data.passes import gather, read_images
from vavae.errors import UserError
from vavae.storage.storage import Storage

COUNTS = (4, 3)


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path))


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("limit", [1, 5, 7, 100])
def test_the_first_images_in_order_whatever_the_batch(storage, limit, batch_size):
    manifest = small.write_image_shards(storage, {"validation": COUNTS})
    batches = list(read_images(storage, manifest, "validation", limit, batch_size))
    count = min(limit, sum(COUNTS))
    assert [len(batch.images) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    found = gather(batches)
    expected = np.stack([small.image("validation", index) for index in range(count)])
    assert np.array_equal(found.images.permute(0, 2, 3, 1), expected)
    assert found.labels.tolist() == [small.label_of(index) for index in range(count)]
    assert (found.images.dtype, found.labels.dtype) == (torch.uint8, torch.int64)


def test_larger_images_are_cut_as_adm_cuts_them(storage):
    manifest = small.write_image_shards(storage, {"validation": (1,)}, height=33, width=20)
    (batch,) = read_images(storage, manifest, "validation", 1, 1)
    expected = center_crop_resize(Image.fromarray(small.image("validation", 0, 33, 20)), small.SIZE)
    assert np.array_equal(batch.images[0].permute(1, 2, 0), np.asarray(expected))


def test_a_shard_with_fewer_images_than_promised_is_an_error(storage):
    manifest = small.write_image_shards(storage, {"validation": COUNTS})
    small.write_image_shards(storage, {"validation": (2, 3)})
    with pytest.raises(UserError, match=r"validation/000000.tar: \d+ bytes where the manifest says \d+"):
        list(read_images(storage, manifest, "validation", 100, 2))
