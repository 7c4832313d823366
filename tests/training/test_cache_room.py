"""A cache that the lanes of a machine would thrash is refused before a worker starts."""

from uuid import uuid4

import pytest
from PIL import Image

from ray_jobs.runtime.preflight import check_cache
from vavae.data.prefetch import OrderedShards
from vavae.data.sample_order import order_of
from vavae.data.shards.write import write_shards
from vavae.errors import UserError
from vavae.runs.config import RunConfig
from vavae.runs.run import Run
from vavae.storage.storage import Storage


@pytest.fixture
def make(tmp_path):
    """Make a run of 24 images in shards of 3 with two lanes that shuffle 4 images each."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(12):
            Image.new("RGB", (8, 8), (20 * index, 0, 0)).save(tmp_path / "images" / name / f"{index}.png")

    def run(**storage):
        training = {"images": 100, "batch_size": 8}
        return Run(
            RunConfig.model_validate(
                {
                    "name": "tiny",
                    "storage": {"root": f"memory://{uuid4()}", "cache": str(tmp_path / "cache"), **storage},
                    "workers": {"count": 2},
                    "shards": {
                        "source": str(tmp_path / "images"), "image_size": 8, "validation_fraction": 0, "shard_images": 3
                    },
                    "stream": {"lanes": 2, "block": 4},
                    "tokenizer": {"channels": 32, "channel_multipliers": [1, 1], "attention_levels": []},
                    "lightningdit": {"size": None, "depth": 1, "width": 32, "heads": 2},
                    "train_vavae": training,
                    "train_lightningdit": training,
                }
            )
        )  # fmt: skip

    return run


def prepared(run):
    """The run with its shards, and these."""
    return run, write_shards(run.storage, run.prefix("prepare_shards"), run.config.shards, lambda done, total: None)


def drawn_from(run, manifest, lanes):
    """Bytes of the shards of the blocks that lanes are in, by brute force, the most in an epoch."""
    infos = manifest.splits["train"]
    order = order_of([info.count for info in infos], run.config.seed, run.config.stream)
    positions = range(0, order.records_per_lane, order.block)
    blocks = [range(start, min(start + order.block, order.records_per_lane)) for start in positions]
    shards = [{order.locate(lane, place).shard for lane in lanes for place in block} for block in blocks]
    found = max(sum(infos[shard].bytes for shard in mine) for mine in shards)
    assert found == OrderedShards(Storage("nowhere"), "train", infos, order, 1).open_bytes(lanes)
    return found


def with_cache(run, limit):
    run.config = run.config.model_copy(update={"storage": run.config.storage.model_copy(update={"cache_bytes": limit})})
    return run


@pytest.mark.parametrize(("cluster", "lanes"), [(False, (0, 1)), (True, (0,))])
def test_a_cache_smaller_than_the_lanes_of_a_machine_need_is_refused(make, monkeypatch, cluster, lanes):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if cluster:
        monkeypatch.setenv("RAY_ADDRESS", "auto")
    run, manifest = prepared(make())
    needed = drawn_from(run, manifest, lanes)
    check_cache(with_cache(run, needed), "train_vavae")
    with pytest.raises(UserError) as caught:
        check_cache(with_cache(run, needed - 1), "train_vavae")
    assert str(caught.value) == (
        f"storage.cache_bytes={needed - 1:,}, but the lanes of a machine ({len(lanes)}) draw from {needed:,} bytes of "
        "shards at a time in train_vavae: raise it"
    )


def test_folders_and_shards_that_are_not_there_yet_need_no_cache(make, tmp_path):
    check_cache(make(cache_bytes=1), "train_vavae")
    check_cache(make(cache_bytes=1), "train_lightningdit")
    run, _ = prepared(make(root=str(tmp_path / "runs"), cache_bytes=1))
    check_cache(run, "train_vavae")
