"""What is seen of a tokenizer during its training, and that it does not notice."""

import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from support import small
from support.tiny import build_step, tiny_config

from vavae.data.manifest import Manifest, write_manifest
from vavae.data.pixels import to_float
from vavae.distributed.world import World
from vavae.metrics.latent_probes import LatentProbes
from vavae.training.run import Run
from vavae.training.tokenizer_observer import TokenizerObserver


class Notes:
    """A log that keeps its last row."""

    row: Mapping[str, float] = {}

    def add(self, images_seen: int, row: Mapping[str, float]) -> None:
        self.row = row


@pytest.fixture
def run(tmp_path):
    config = tiny_config(train_vavae={"ema_decay": None})
    return Run(config.model_copy(update={"storage": config.storage.model_copy(update={"root": str(tmp_path)})}))


def shards(run: Run, **counts: tuple[int, ...]) -> Manifest:
    manifest = small.write_image_shards(run.storage.child("shards"), counts)
    write_manifest(run.storage, "shards", manifest)
    return manifest


def look(run, manifest, step, world=World()) -> Mapping[str, float]:  # noqa: B008
    notes = Notes()
    TokenizerObserver(run, manifest, 8, world).observe(step, 8, notes)  # type: ignore[arg-type]
    return notes.row


def test_a_look_tells_of_the_present_weights_and_is_the_same_again(run):
    manifest = shards(run, train=(2,), validation=(20,))
    step = build_step("train_vavae", run.config, World())
    row = look(run, manifest, step)
    assert [*row] == [f"latent/{name}" for name in LatentProbes._fields]
    assert look(run, manifest, step) == row
    images = torch.from_numpy(np.stack([small.image("validation", index) for index in range(20)])).permute(0, 3, 1, 2)
    posterior = step.engines["generator"].module.autoencoder.encode(to_float(images))
    total = (posterior.mean.var((0, 2, 3)) + posterior.std.square().mean((0, 2, 3))).sqrt()
    assert row["latent/channel_std_max"] == pytest.approx(total.max().item(), rel=0.1)
    with torch.no_grad():
        step.engines["generator"].module.autoencoder.quant_conv.weight.mul_(2)
    assert look(run, manifest, step)["latent/channel_std_max"] != row["latent/channel_std_max"]


def test_the_average_is_looked_at_where_there_is_one(run):
    averaged = Run(
        run.config.model_copy(update={"train_vavae": run.config.train_vavae.model_copy(update={"ema_decay": 0.9})})
    )
    manifest = shards(run, train=(2,), validation=(5,))
    step = build_step("train_vavae", averaged.config, World())
    row = look(run, manifest, step)
    with torch.no_grad():
        step.engines["generator"].module.autoencoder.quant_conv.weight.mul_(2)
    assert look(run, manifest, step) == row


def test_nothing_is_drawn_from_a_global_generator_and_nothing_of_the_step_changes(run):
    manifest = shards(run, train=(2,), validation=(5,))
    step = build_step("train_vavae", run.config, World())
    module = step.engines["generator"].module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    states = (torch.get_rng_state(), str(np.random.get_state()), random.getstate())  # noqa: NPY002
    look(run, manifest, step)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (str(np.random.get_state()), random.getstate()) == states[1:]  # noqa: NPY002
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())


def test_without_held_out_images_it_is_training_images(run):
    step = build_step("train_vavae", run.config, World())
    held_out = look(run, shards(run, train=(5,), validation=(5,)), step)
    train = look(run, shards(run, train=(5,), validation=()), step)
    assert train
    assert train != held_out


def test_only_the_first_rank_looks(run):
    step = build_step("train_vavae", run.config, World())
    assert look(run, shards(run, train=(2,), validation=(2,)), step, World(rank=1, size=2)) == {}
