"""Probes and previews of a tokenizer, without an effect on its training."""

import io
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from support import image_shards
from support.image_shards import write_image_shards
from support.training_steps import Notes, build_step, tiny_config

from vavae.data.pixels import enlargement, to_float, to_pixels
from vavae.distributed.world import World
from vavae.metrics.equivariance import EquivarianceErrors
from vavae.metrics.latent_space import LatentProbes
from vavae.randomness import torch_generator
from vavae.storage.storage import Storage
from vavae.training.callbacks.tokenizer import SHOWN, LatentProbe, ReconstructionPreview, held_out_images

CONFIG = tiny_config(train_vavae={"ema_decay": None})
AVERAGED = tiny_config(train_vavae={"ema_decay": 0.9})


def images(count=20):
    drawn = np.stack([image_shards.image("validation", index, 16, 16) for index in range(count)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2)


def autoencoder(step):
    return step.engines["generator"].module.autoencoder


def spoil(step):
    with torch.no_grad():
        autoencoder(step).quant_conv.weight.mul_(2)


def probe(step, config=CONFIG, world=World()):  # noqa: B008
    notes = Notes()
    LatentProbe(config, images(), 8, world).on_interval(step, 8, notes)
    return notes.row


def preview(storage, step, config=CONFIG, world=World()):  # noqa: B008
    """The picture as rows of images, uint8 [3, N, H, W, 3]."""
    notes = Notes()
    ReconstructionPreview(config, images(), 8, storage, world).on_interval(step, 8, notes)
    if not storage.exists("000000000008.png"):
        return None
    assert notes.picture_name == "reconstructions"
    scale, side, gap = enlargement((16, 16)), 16 * enlargement((16, 16)), 2
    pixels = np.asarray(Image.open(io.BytesIO(storage.read_bytes("000000000008.png"))).convert("RGB"))
    places = [[(row * (side + gap), column * (side + gap)) for column in range(SHOWN)] for row in range(3)]
    return np.array([[pixels[y : y + side : scale, x : x + side : scale] for y, x in row] for row in places])


def test_a_black_picture_is_none_and_ends_no_training(storage, caplog):
    step = build_step("train_vavae", CONFIG, World())
    with torch.no_grad():
        autoencoder(step).quant_conv.weight.view(-1)[0] = torch.nan
    assert preview(storage, step) is None
    assert "no preview at 8 images: the reconstructions are not finite" in caplog.text


def test_a_probe_follows_the_present_weights_and_is_reproducible():
    step = build_step("train_vavae", CONFIG, World())
    row = probe(step)
    expected = [f"latent/{name}" for name in LatentProbes._fields]
    assert [*row] == [*expected, *(f"equivariance_error/{name}" for name in EquivarianceErrors._fields)]
    assert all(map(math.isfinite, row.values()))
    assert probe(step) == row
    posterior = autoencoder(step).encode(to_float(images()))
    total = (posterior.mean.var((0, 2, 3)) + posterior.std.square().mean((0, 2, 3))).sqrt()
    assert row["latent/channel_std_max"] == pytest.approx(total.max().item(), rel=0.1)
    spoil(step)
    assert probe(step)["latent/channel_std_max"] != row["latent/channel_std_max"]


def test_the_equivariance_of_the_first_images_is_logged():
    step = build_step("train_vavae", CONFIG, World())
    row, model = probe(step), autoencoder(step)
    with torch.no_grad():
        posterior = model.encode(to_float(images(16)))
        noise = torch.randn(posterior.mean.shape, generator=torch_generator(CONFIG.seed, "observed posterior"))
        z = posterior.at(noise)
        decoded = model.decode(z)
        turned = model.decode(z.flip(2).mT)  # a quarter clockwise, as rows become columns from the right
        difference = (turned - decoded.flip(2).mT).square().mean() / (decoded - to_float(images(16))).square().mean()
    assert row["equivariance_error/quarter_turn"] == pytest.approx(difference.item(), rel=1e-4)


def test_a_preview_shows_images_reconstructions_and_their_difference(storage):
    step = build_step("train_vavae", CONFIG, World())
    originals, restored, difference = preview(storage, step)
    expected = images(SHOWN).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(originals, expected)
    with torch.no_grad():
        posterior = autoencoder(step).encode(to_float(images(SHOWN)))
        noise = torch.randn(posterior.mean.shape, generator=torch_generator(CONFIG.seed, "observed posterior"))
        by_hand = to_pixels(autoencoder(step).decode(posterior.at(noise))).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(restored, by_hand)
    np.testing.assert_array_equal(difference, np.minimum(4 * abs(restored.astype(int) - originals), 255))


def test_the_average_is_probed_where_there_is_one(storage):
    step = build_step("train_vavae", AVERAGED, World())
    row, picture = probe(step, AVERAGED), preview(storage, step, AVERAGED)
    spoil(step)
    assert probe(step, AVERAGED) == row
    np.testing.assert_array_equal(preview(storage, step, AVERAGED), picture)


def test_nothing_is_drawn_from_a_global_generator_and_nothing_of_the_step_changes(storage):
    step = build_step("train_vavae", CONFIG, World())
    module = step.engines["generator"].module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    states = (torch.get_rng_state(), str(np.random.get_state()), random.getstate())  # noqa: NPY002
    probe(step)
    preview(storage, step)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (str(np.random.get_state()), random.getstate()) == states[1:]  # noqa: NPY002
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())


def test_only_the_first_rank_probes_and_previews(storage):
    step = build_step("train_vavae", CONFIG, World())
    second = World(rank=1, size=2)
    assert probe(step, world=second) is None
    assert preview(storage, step, world=second) is None


def test_without_held_out_images_training_images_are_used(tmp_path):
    shards = Storage(str(tmp_path))
    found = [
        held_out_images(shards, write_image_shards(shards, counts))
        for counts in ({"train": (5,), "validation": (4,)}, {"train": (5,), "validation": ()}, {"train": (5,)})
    ]
    assert list(map(len, found)) == [4, 5, 5]
