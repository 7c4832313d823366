"""Previews of a LightningDiT: the first samples of the average, without an effect on the training."""

import numpy as np
import pytest
import torch
from support.training_steps import CLASSES, Notes, build_step, tiny_config

from vavae.data.image import png_bytes
from vavae.data.pixels import enlargement, image_grid
from vavae.distributed.world import World
from vavae.latents.statistics import LatentNormalizer
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.sampling.sampler import Sampler
from vavae.training.callbacks.diffusion import SHOWN, SamplePreview
from vavae.training.initialize import initialized

CONFIG = tiny_config().model_validate(tiny_config().model_dump() | {"solver": {"name": "heun", "num_steps": 2}})
NAMES = tuple("abc")


@pytest.fixture
def parts():
    """A tokenizer and a normalizer."""
    tokenizer = initialized(3, "preview", lambda: VAVAE(CONFIG.tokenizer)).eval().requires_grad_(False)
    return tokenizer, LatentNormalizer(torch.full((4,), 0.5), torch.full((4,), 2.0))


def preview(storage, step, parts, world=World()):  # noqa: B008
    model = CONFIG.lightningdit.with_classes(CLASSES)
    SamplePreview(CONFIG, model, *parts, NAMES, 8, storage, world).on_interval(step, 8, Notes())
    return storage.read_bytes("000000000008.png") if storage.exists("000000000008.png") else None


def randomize(step):
    """Weights that are not zero where a fresh model's are, in the model alone or in the average too."""
    with torch.no_grad():
        for parameter in step.engines["lightningdit"].module.parameters():
            parameter.add_(0.05)


def test_a_black_picture_is_none_and_ends_no_training(storage, parts, caplog):
    step = build_step("train_lightningdit", CONFIG, World())
    parts[1].mean[0] = torch.nan
    assert preview(storage, step, parts) is None
    assert "no preview at 8 images: statistics of the latents: mean[0] is nan" in caplog.text


def test_it_is_what_sampling_would_make_of_the_average(storage, parts):
    step = build_step("train_lightningdit", CONFIG, World())
    randomize(step)
    step.ema.load(step.engines["lightningdit"].local_shards())
    found = preview(storage, step, parts)
    generator = Sampler(parts[0], step.engines["lightningdit"].module.model.eval(), parts[1])
    labels = [index % CLASSES for index in range(SHOWN)]
    images = generator.images(range(SHOWN), labels, CONFIG.seed, CONFIG.guidance, CONFIG.solver)
    assert images.float().std() > 1
    assert found == png_bytes(image_grid(images, 8, scale=enlargement((16, 16))))
    randomize(step)  # the average stays
    assert preview(storage, step, parts) == found
    step.ema.load(step.engines["lightningdit"].local_shards())
    assert preview(storage, step, parts) != found


def test_nothing_is_drawn_from_a_global_generator_and_nothing_of_the_step_changes(storage, parts):
    step = build_step("train_lightningdit", CONFIG, World())
    module = step.engines["lightningdit"].module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    states = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    preview(storage, step, parts)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert str(np.random.get_state()) == states[1]  # noqa: NPY002
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_only_the_first_rank_samples(storage, parts):
    step = build_step("train_lightningdit", CONFIG, World())
    assert preview(storage, step, parts, World(rank=1, size=2)) is None


def test_a_preview_that_finds_no_memory_is_left_out(storage, parts, monkeypatch, caplog):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Sampler, "images", out_of_memory)
    step = build_step("train_lightningdit", CONFIG, World())
    assert preview(storage, step, parts) is None
    assert "no preview at 8 images" in caplog.text
