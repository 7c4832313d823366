"""Tokens drawn from latent shards, and what is made of them."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vavae.data.shards.manifest import ShardInfo
from vavae.errors import UserError
from vavae.evaluation.latent_space import draw_tokens, evaluate_latent_space
from vavae.latents.manifest import MANIFEST, LatentManifest
from vavae.latents.shards import write_latents
from vavae.latents.statistics import STATISTICS
from vavae.metrics.config import LatentSpaceConfig
from vavae.storage.storage import sha256_of

SHAPE = (3, 2, 4)
FULL = LatentSpaceConfig(tokens=100, samplings=2)
"""Takes every image of the latents below that it may."""


def write(storage, counts, flip, std=0.0):
    """Latents whose channels are the number of the image, 1,000 for its mirror image, and ten rows plus columns."""
    infos, first = [], 0
    for number, count in enumerate(counts):
        means = np.zeros((count, 1 + flip, *SHAPE), np.float32)
        means[:, :, 0] = np.arange(first, first + count).reshape(-1, 1, 1, 1)
        means[:, 1:, 1] = 1000
        means[:, :, 2] = 10 * np.arange(SHAPE[1])[:, None] + np.arange(SHAPE[2])
        records = np.stack([means, np.full_like(means, std)], 2).reshape(count, -1, *SHAPE).astype(np.float16)
        name = f"{number:06d}.tar"
        with storage.create(f"train/{name}") as path:
            write_latents(path, records, [0] * count, first)
            infos.append(ShardInfo(name=name, count=count, bytes=path.stat().st_size, sha256=sha256_of(path)))
        first += count
    manifest = LatentManifest(tokenizer="t", shape=SHAPE, flip=flip, classes=("a",), splits={"train": tuple(infos)})
    storage.write_json(MANIFEST, manifest.model_dump(mode="json"))
    with storage.create(STATISTICS) as path:
        save_file({"mean": torch.tensor([0.0, 0, 5]).double(), "std": torch.tensor([1.0, 1, 2]).double()}, path)


@pytest.mark.parametrize("flip", [False, True])
def test_every_image_gives_one_token_of_any_place_and_view_whitened(storage, flip):
    write(storage, (60, 40), flip)
    tokens = draw_tokens(storage, FULL, 0, 0)
    assert tokens.dtype == np.float32
    assert sorted(tokens[:, 0]) == [*range(100)]
    places = 2 * tokens[:, 2] + 5
    assert {*places} == {10 * row + column for row in range(SHAPE[1]) for column in range(SHAPE[2])}
    assert {*tokens[:, 1]} == ({0, 1000} if flip else {0})


def test_the_posterior_is_sampled(storage):
    write(storage, (400,), flip=False, std=0.5)
    drawn = draw_tokens(storage, LatentSpaceConfig(tokens=400, samplings=1), 0, 0)
    assert drawn[:, 1].std() == pytest.approx(0.5, rel=0.15)


def test_samplings_differ_and_equal_keys_draw_alike(storage):
    write(storage, (150, 150), flip=True, std=0.1)
    draws = [draw_tokens(storage, FULL, *key) for key in ((0, 0), (0, 0), (0, 1), (1, 0))]
    np.testing.assert_array_equal(draws[0], draws[1])
    for other in draws[2:]:
        assert (np.sort(draws[0][:, 0]) != np.sort(other[:, 0])).any()


def test_no_more_shards_are_read_than_the_samplings_need(storage):
    write(storage, (150, 50, 100), flip=False)
    storage.delete("train/000002.tar")
    assert draw_tokens(storage, FULL, 0, 0)[:, 0].max() < 200


def test_a_measure_is_the_mean_of_its_samplings_whatever_their_processes(storage):
    write(storage, (120,), flip=False, std=1.0)
    found = evaluate_latent_space(storage, FULL, 0)
    assert found.tokens == 100
    assert len(found.samplings) == 2
    assert found.mean.cv == pytest.approx((found.samplings[0].cv + found.samplings[1].cv) / 2)
    assert found.spread is not None
    assert found.spread.cv == pytest.approx(abs(found.samplings[0].cv - found.samplings[1].cv) / 2**0.5)
    parallel = evaluate_latent_space(storage, FULL.model_copy(update={"processes": 2}), 0)
    assert parallel.samplings == found.samplings


def test_one_sampling_has_no_spread(storage):
    write(storage, (100,), flip=False, std=1.0)
    assert evaluate_latent_space(storage, LatentSpaceConfig(tokens=100, samplings=1), 0).spread is None


def test_too_few_latents_are_refused(storage):
    write(storage, (91,), flip=False)
    with pytest.raises(UserError, match=r"latents of 91 training images, and a map takes 92: set evaluate\.latent"):
        draw_tokens(storage, FULL, 0, 0)
