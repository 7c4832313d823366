"""Features beside the latents: those of the frozen network, made once, whatever happens to the job or the latents."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import image_shards, small_models
from support.image_shards import write_image_shards

from vavae.data.pixels import to_float
from vavae.distributed.config import WorkersConfig
from vavae.errors import UserError
from vavae.latents.config import FeaturesConfig, LatentsConfig
from vavae.latents.extract import Extraction
from vavae.latents.features import FeatureExtraction, read_features_of
from vavae.latents.shards import map_features
from vavae.models.tokenizer.config import TeacherConfig
from vavae.models.tokenizer.teacher import VisionFoundationTeacher
from vavae.storage.storage import Storage

COUNTS = {"train": (5, 3), "validation": (2,)}
GRID = (small_models.GRID, small_models.GRID)
SHAPE = (small_models.TOKENIZER.latent_dim, *GRID)
PLAIN = LatentsConfig(batch_size=4)
FEATURES = FeaturesConfig(teacher=TeacherConfig())
CONFIG = PLAIN.model_copy(update={"features": FEATURES})
CPU = torch.device("cpu")


class Counter:
    """The tokenizer, with the number of batches that it was given."""

    def __init__(self):
        self.model, self.batches = small_models.tokenizer(), 0
        self.config = self.model.config

    def encode(self, images):
        self.batches += 1
        return self.model.encode(images)


@pytest.fixture
def computed(monkeypatch):
    """Sizes of the batches of features that were computed."""
    sizes, forward = [], VisionFoundationTeacher.forward

    def counting(teacher, images, grid):
        sizes.append(len(images))
        return forward(teacher, images, grid)

    monkeypatch.setattr(VisionFoundationTeacher, "forward", counting)
    return sizes


@pytest.fixture
def extract(tmp_path):
    images = Storage(str(tmp_path / "images"))
    manifest = write_image_shards(images, COUNTS, damaged=[("train", 1)])

    def make(config=CONFIG, folder="latents"):
        latents = Storage(str(tmp_path / folder))
        features = None
        if config.features is not None:
            features = FeatureExtraction(images, manifest, latents, config, GRID, WorkersConfig())
        return Extraction(images, manifest, latents, "t", config, features=features)

    return make


def encode_all(extraction, model=None, advance=lambda count: None):
    model = model or Counter()
    return extraction.finish(SHAPE, [extraction.encode(task, model, CPU, advance) for task in extraction.tasks()])


def contents(tmp_path, folder="latents"):
    storage = Storage(str(tmp_path / folder))
    return {path: storage.read_bytes(path) for path in storage.list(recursive=True)}


def read_all(tmp_path, config=CONFIG):
    latents = Storage(str(tmp_path / "latents"))
    manifest = read_features_of(latents, config, GRID)
    shards = [
        map_features(latents.local_file(f"features/train/{info.name}"), info.count, manifest.record_shape)
        for info in manifest.shards
    ]
    return torch.from_numpy(np.concatenate(shards)).view(torch.bfloat16)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_features_are_those_of_the_network_for_each_image_and_its_mirror_image(tmp_path, extract, patch_size):
    features = FEATURES.model_copy(update={"patch_size": patch_size})
    config = CONFIG.model_copy(update={"features": features})
    encode_all(extract(config))
    found, teacher = read_all(tmp_path, config), VisionFoundationTeacher(FEATURES.teacher)
    side = GRID[0] // patch_size
    assert found.shape == (7, 2, side**2, teacher.feature_dim)
    for row, index in enumerate([0, *range(2, 8)]):  # one can't be read
        image = to_float(torch.from_numpy(image_shards.image("train", index)).permute(2, 0, 1)[None])
        image = F.interpolate(image, (16 * side, 16 * side), mode="bicubic", align_corners=False)
        for view, pixels in enumerate((image, image.flip(-1))):
            expected = teacher(pixels, (side, side))[0].flatten(1).T
            torch.testing.assert_close(found[row, view].float(), expected, rtol=1e-2, atol=1e-3)


def test_a_class_token_lies_before_them_and_is_their_mean_where_the_network_has_none(tmp_path, extract):
    config = CONFIG.model_copy(update={"features": FEATURES.model_copy(update={"class_token": True})})
    encode_all(extract(config))
    found = read_all(tmp_path, config).float()
    assert found.shape[2] == 1 + GRID[0] * GRID[1]
    torch.testing.assert_close(found[:, :, 0], found[:, :, 1:].mean(2), rtol=1e-2, atol=1e-2)


def test_they_change_no_latent_and_are_added_to_latents_that_are_there(tmp_path, extract, computed):
    plain, model = encode_all(extract(PLAIN, "plain")), Counter()
    encode_all(extract(PLAIN), model)
    digest, files = encode_all(extract(), Counter())
    assert model.batches == 6
    assert digest != plain[0]
    again = Counter()
    assert encode_all(extract(), again) == (digest, files)
    assert again.batches == 0, "latents are made once"
    assert computed == [4] * 4, "each shard and its mirror images, once"
    before, now = contents(tmp_path, "plain"), contents(tmp_path)
    assert {path: now[path] for path in before} == before
    assert {path for path in files if path not in plain[1]} == {
        "features/manifest.json", "features/train/000000.tar", "features/train/000001.tar"
    }  # fmt: skip
    assert {path: info.bytes for path, info in files.items()} == {path: len(now[path]) for path in files}


def test_a_job_that_was_killed_goes_on_and_others_are_made_again(tmp_path, extract, computed):
    whole = encode_all(extract(folder="whole"))
    del computed[:]

    def die(count):
        if computed:
            raise KeyboardInterrupt

    extraction, model = extract(), Counter()
    with pytest.raises(KeyboardInterrupt):
        encode_all(extraction, model, die)
    assert not any(path.startswith("features") for path in contents(tmp_path))
    del computed[:]
    assert encode_all(extraction, model) == whole
    assert contents(tmp_path) == contents(tmp_path, "whole")
    assert model.batches == 6, "the latents that were there stayed"
    (tmp_path / "latents/features/train/000001.json").unlink()
    del computed[:]
    assert encode_all(extract()) == whole
    assert computed == [4, 4]
    strided = FEATURES.model_copy(update={"teacher": TeacherConfig(stage_stride=8)})
    with pytest.raises(UserError, match=r"other features than latents.features says; run precompute_latents"):
        read_all(tmp_path, CONFIG.model_copy(update={"features": strided}))
    encode_all(extract(CONFIG.model_copy(update={"features": strided})))
    assert len(computed) == 6


def test_progress_counts_images_of_both(extract):
    counts, extraction = [], extract()
    encode_all(extraction, advance=counts.append)
    assert sum(counts) == extraction.images == 18


def test_features_that_are_not_finite_are_named_by_their_image(extract, monkeypatch):
    def overflowing(teacher, images, grid):
        features = images.new_zeros(len(images), 2, *grid)
        features[1] = torch.inf
        return features

    monkeypatch.setattr(VisionFoundationTeacher, "forward", overflowing)
    with pytest.raises(UserError, match=r"^train 2: its features are not finite; set latents.precision=fp32"):
        encode_all(extract())


def test_latents_without_features_name_the_job_to_run(tmp_path, extract):
    encode_all(extract(PLAIN))
    with pytest.raises(UserError, match=r"features/manifest.json: no manifest of features there; run precompute"):
        read_all(tmp_path)
