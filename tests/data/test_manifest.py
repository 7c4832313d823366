"""Manifests keep their shards as columns: the files stay as they were, and a shard is made when it is asked for."""

import hashlib
import json
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from vavae.data.config import StreamConfig
from vavae.data.image_stream import ImageStream
from vavae.data.sample_order import order_of
from vavae.data.shards.manifest import MANIFEST, Manifest, ShardInfo, ShardList, read_manifest, write_manifest
from vavae.errors import UserError
from vavae.latents.manifest import LatentManifest, read_latent_manifest
from vavae.storage.storage import Storage

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
sizes = st.integers(0, 2**63 - 1)
shard_infos = st.builds(
    ShardInfo,
    name=text,
    count=sizes,
    bytes=sizes,
    sha256=text,
    url=st.none() | text.filter(bool),
    dropped=st.none() | st.lists(st.integers(0, 9), max_size=3).map(tuple),
)
splits = st.dictionaries(st.sampled_from(["train", "validation"]), st.lists(shard_infos, max_size=4).map(tuple))


class ImagesAsObjects(BaseModel):
    """A manifest of images as it was before."""

    splits: dict[str, tuple[ShardInfo, ...]]
    classes: tuple[str, ...] = ("a", "b")
    image_size: int = 8
    sources: dict[str, int] = {}
    skipped: tuple[str, ...] = ()
    skipped_count: int = 0


class LatentsAsObjects(BaseModel):
    """A manifest of latents as it was before."""

    splits: dict[str, tuple[ShardInfo, ...]]
    classes: tuple[str, ...] = ("a", "b")
    tokenizer: str = "t"
    shape: tuple[int, int, int] = (1, 2, 3)
    flip: bool = True


def stored(value):
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


@given(splits)
def test_the_file_of_images_is_the_same_to_the_byte_and_read_back(splits):
    storage = Storage("memory://manifests")
    manifest = Manifest(splits=splits, classes=("a", "b"), image_size=8, sources={})
    write_manifest(storage, "", manifest)
    objects = ImagesAsObjects(splits=splits)
    assert storage.read_bytes(MANIFEST) == stored(objects.model_dump(mode="json", exclude_none=True))
    assert read_manifest(storage) == manifest
    assert {split: tuple(shards) for split, shards in read_manifest(storage).splits.items()} == splits


@given(splits)
def test_the_file_of_latents_is_the_same_to_the_byte_and_read_back(splits):
    storage = Storage("memory://latents")
    manifest = LatentManifest(tokenizer="t", shape=(1, 2, 3), flip=True, classes=("a", "b"), splits=splits)
    storage.write_json(MANIFEST, manifest.to_json())
    assert storage.read_bytes(MANIFEST) == stored(LatentsAsObjects(splits=splits).model_dump(mode="json"))
    assert read_latent_manifest(storage) == manifest
    assert {split: tuple(shards) for split, shards in manifest.splits.items()} == splits


@given(st.lists(shard_infos, max_size=5), st.slices(5))
def test_a_list_is_a_sequence_of_its_shards(infos, part):
    shards = ShardList.of(infos)
    assert [*shards] == infos
    assert [*shards[part]] == infos[part]
    assert [shards[at] for at in range(-len(infos), 0)] == infos
    with pytest.raises(IndexError):
        shards[len(infos)]
    assert pickle.loads(pickle.dumps(shards)) == shards == ShardList.of(shards)
    assert (shards != ShardList.of(infos[1:])) == bool(infos)
    assert shards.counts.tolist() == [info.count for info in infos]
    assert shards.sizes.tolist() == [info.bytes for info in infos]
    assert shards.has_urls == any(info.url for info in infos)


@pytest.mark.parametrize(
    "change", [{"count": "3 images"}, {"count": -1}, {"bytes": 2**63}, {"sha256": None}, {"size": 3}, {"name": ...}]
)
def test_a_damaged_entry_is_refused(storage, change):
    entry = {"name": "000000.tar", "count": 3, "bytes": 10, "sha256": "a", **change}
    values = {"classes": ["x"], "image_size": 8, "sources": {}}
    entry = {key: value for key, value in entry.items() if value is not ...}
    storage.write_json(MANIFEST, {**values, "splits": {"train": [entry]}})
    with pytest.raises(UserError, match=rf"{MANIFEST} is no manifest \(.*delete"):
        read_manifest(storage)


SHARDS = 5_000


def many_shards():
    return [
        {"name": f"{at:06d}.tar", "count": 1000, "bytes": 10**8, "sha256": hashlib.sha256(b"%d" % at).hexdigest()}
        for at in range(SHARDS)
    ]


def kept_bytes(make):
    tracemalloc.start()
    kept = make()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept is not None
    return size


def test_columns_take_a_fraction_of_the_memory_of_objects():
    data = json.dumps({"splits": {"train": many_shards()}, "classes": [], "image_size": 8, "sources": {}})
    objects = TypeAdapter(ImagesAsObjects)
    Manifest.model_validate_json(data), objects.validate_json(data)  # what is imported at first counts for nobody
    columns = kept_bytes(lambda: Manifest.model_validate_json(data))
    assert columns < 110 * SHARDS
    assert columns < kept_bytes(lambda: objects.validate_json(data)) / 5


def test_a_stream_of_many_shards_is_small_to_hand_to_a_process():
    config = StreamConfig(lanes=1)
    manifest = Manifest(splits={"train": many_shards()}, classes=("a",), image_size=8, sources={})
    shards = manifest.splits["train"]
    stream = ImageStream(Storage("/nowhere"), manifest, "train", order_of(shards.counts, 0, config), 4, config, 0)
    assert len(pickle.dumps(stream)) < 110 * SHARDS
    again = pickle.loads(pickle.dumps(stream))
    assert again.shards.infos == shards
    assert again.shards.order.micro_batch(0, 3, 4) == stream.shards.order.micro_batch(0, 3, 4)
    assert again.shards.order.counts.dtype == np.int64
