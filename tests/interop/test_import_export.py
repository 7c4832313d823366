"""``vavae import`` and ``vavae export``: released weights in the place of a training, and a run's weights out again."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from support import in_process, small_models

from vavae.cli.main import main
from vavae.config import load
from vavae.data.shards.write import write_shards
from vavae.errors import UserError
from vavae.interop.export import ALIGNMENT, load_alignment, load_lightningdit, load_tokenizer
from vavae.interop.released_lightningdit import save_released_lightningdit
from vavae.interop.released_tokenizer import load_released_tokenizer, save_released_tokenizer
from vavae.latents.manifest import read_latent_manifest
from vavae.latents.statistics import read_statistics
from vavae.losses.vision_foundation import VisionFoundationLoss
from vavae.models.dit.model import LightningDiT
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.runs.config import RunConfig
from vavae.runs.run import Run

FEATURES = 112
"""Channels of the embedded teacher."""


class Exchange:
    """A run with images, released files beside it, and the command line."""

    def __init__(self, folder):
        self.folder = folder
        for index in range(24):
            path = folder / "images" / f"class{index % 3}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        training = {"images": 64, "batch_size": 8}
        document = {
            "name": "run",
            "storage": {"root": str(folder / "runs")},
            "shards": {"source": str(folder / "images"), "image_size": 16, "validation_fraction": 0.4},
            "stream": {"lanes": 2},
            "tokenizer": small_models.TOKENIZER.model_dump(mode="json"),
            "losses": {"perceptual": {"kind": "teacher_features"}},
            "train_vavae": training,
            "lightningdit": {"size": None, "depth": 1, "width": 32, "heads": 2, "rope": False},
            "train_lightningdit": training,
            "solver": {"num_steps": 2},
            "sample": {"images": 6},
            "evaluate": {"images": 6},
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(document))
        self.config = self.run().config
        write_shards(self.run().storage, "shards", self.config.shards, lambda *_: None)

    def run(self, *overrides):
        return Run(load(RunConfig, self.folder / "run.yaml", overrides))

    def command(self, verb, model, name, *words):
        """Exit status of ``vavae VERB MODEL FILE --config ... WORDS``."""
        return main([verb, model, str(self.folder / name), "--config", str(self.folder / "run.yaml"), *words])

    def write_tokenizer(self, name="epoch=1.ckpt", features=FEATURES, **sizes):
        model = small_models.randomized(VAVAE(small_models.TOKENIZER.model_copy(update=sizes)))
        config = self.config.losses.vision_foundation
        alignment = features and small_models.randomized(
            VisionFoundationLoss(config, model.config.latent_dim, features)
        )
        save_released_tokenizer(self.folder / name, model, alignment or None)
        return model.state_dict()

    def write_lightningdit(self, name="model.safetensors", classes=3):
        config = self.config.lightningdit.with_classes(classes)
        model = LightningDiT(config, small_models.TOKENIZER.latent_dim, 8)
        positions = model.pos_embed.clone()
        small_models.randomized(model).pos_embed.copy_(positions)
        save_released_lightningdit(self.folder / name, model)
        return model.state_dict()

    def extract(self):
        in_process.precompute_latents(self.run())

    def sample_and_evaluate(self):
        in_process.sample(self.run())
        in_process.evaluate_and_report(self.run())


@pytest.fixture
def exchange(tmp_path):
    return Exchange(tmp_path)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("aligned", [True, False])
def test_a_run_of_imported_weights_alone_goes_through_all_stages(exchange, aligned, capsys):
    tokenizer = exchange.write_tokenizer(features=FEATURES if aligned else 0)
    lightningdit = exchange.write_lightningdit()
    assert exchange.command("import", "tokenizer", "epoch=1.ckpt") == 0
    exchange.extract()
    assert exchange.command("import", "lightningdit", "model.safetensors") == 0
    exchange.sample_and_evaluate()
    plans = exchange.run().plans()
    assert [job for job, plan in plans.items() if not plan.done] == []
    metrics = json.loads(exchange.run().storage.read_bytes("metrics.json"))
    assert ("alignment_cosine" in metrics) == aligned
    for model, name, state in (("tokenizer", "t.pt", tokenizer), ("lightningdit", "l.pt", lightningdit)):
        assert exchange.command("export", model, name) == 0
        (exported,) = torch.load(exchange.folder / name).values()
        assert ("linear_proj.weight" in exported) == (aligned and model == "tokenizer")
        assert same({key: tensor for key, tensor in exported.items() if key != "linear_proj.weight"}, state)


def test_an_imported_tokenizer_stands_where_a_trained_one_would(exchange):
    state = exchange.write_tokenizer()
    assert exchange.command("import", "tokenizer", "epoch=1.ckpt") == 0
    run = exchange.run()
    export = run.storage.child(run.prefix("train_vavae"))
    autoencoder, description = load_tokenizer(export)
    assert same(autoencoder.state_dict(), state)
    assert description.tokenizer == run.config.tokenizer
    assert description.feature_dim == FEATURES
    assert load_alignment(export).projection.weight.shape[0] == FEATURES
    record = run.require("train_vavae")
    assert record.details["imported"] == "epoch=1.ckpt"
    assert record.images_seen is None  # nobody knows how many
    assert exchange.run("train_vavae.images=128").plan("train_vavae").done  # there is no training that could go on
    with pytest.raises(UserError, match=r"the tokenizer is imported from epoch=1.ckpt; give the run"):
        run.claim("train_vavae")


def test_an_import_can_be_repeated_and_goes_stale_with_the_configuration(exchange):
    exchange.write_tokenizer()
    assert exchange.command("import", "tokenizer", "epoch=1.ckpt") == 0
    first = exchange.run().require("train_vavae")
    assert exchange.command("import", "tokenizer", "epoch=1.ckpt") == 0
    assert exchange.run().require("train_vavae") == first
    with pytest.raises(UserError, match=r"tokenizer was imported with another configuration; import it again$"):
        exchange.run("seed=1").plan("train_vavae")
    assert exchange.command("import", "tokenizer", "epoch=1.ckpt", "seed=1") == 0
    assert exchange.run("seed=1").plan("train_vavae").done


def test_another_projection_needs_its_teacher(exchange, capsys):
    exchange.write_tokenizer(features=1024)
    assert exchange.command("import", "tokenizer", "epoch=1.ckpt") == 2
    message = "linear_proj.weight is [1024, 4, 1, 1], expected [112, 4, 1, 1] with teacher.name=efficientnet_lite0"
    assert message in capsys.readouterr().err
    assert exchange.run().artifact("train_vavae") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["tokenizer.latent_dim=8"],
            "is [8, 32, 3, 3], expected [16, 32, 3, 3] with tokenizer.latent_dim=8",
        ),
        (
            ["tokenizer.res_blocks=2"],
            "no tensor encoder.down.0.block.1.norm1.weight, expected [32] with tokenizer",
        ),
        (
            ["losses.vision_foundation.projection=teacher_to_latent"],
            "with losses.vision_foundation.projection=teacher_to",
        ),
        (["name=empty"], "no image shards yet; run python -m ray_jobs.prepare_shards"),
        (["nonsense"], "nonsense (command line): an override has the form key.path=value"),
    ],
)
def test_a_tokenizer_of_another_configuration_is_refused_in_one_line(exchange, capsys, words, message):
    exchange.write_tokenizer()
    assert exchange.command("import", "tokenizer", "epoch=1.ckpt", *words) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert exchange.run().artifact("train_vavae") is None


def test_a_lightningdit_needs_the_latents_and_their_classes(exchange, capsys):
    exchange.write_tokenizer()
    exchange.command("import", "tokenizer", "epoch=1.ckpt")
    exchange.write_lightningdit(classes=7)
    assert exchange.command("import", "lightningdit", "model.safetensors") == 2
    assert "no latents yet" in capsys.readouterr().err
    exchange.extract()
    assert exchange.command("import", "lightningdit", "model.safetensors") == 2
    message = "embedding_table.weight is [8, 32], expected [4, 32] with lightningdit.classes=3: correct that"
    assert message in capsys.readouterr().err
    exchange.write_lightningdit()
    assert exchange.command("import", "lightningdit", "model.safetensors") == 0
    _, description = load_lightningdit(exchange.run().storage.child("lightningdit/export"))
    assert description.tokenizer == exchange.run().require("train_vavae").digest
    assert exchange.run().plan("train_lightningdit").done


def test_what_was_trained_here_is_not_replaced(exchange, capsys):
    exchange.write_tokenizer()
    run = exchange.run()
    run.storage.write_bytes(f"{run.training_prefix('train_vavae')}/checkpoints/000000000008/made", b"")
    assert exchange.command("import", "tokenizer", "epoch=1.ckpt") == 2
    assert "has its own tokenizer; give the run another name" in capsys.readouterr().err
    run.storage.delete(run.training_prefix("train_vavae"))
    run.output("train_vavae").commit("content", {}, images_seen=64)
    assert exchange.command("import", "tokenizer", "epoch=1.ckpt") == 2
    assert run.require("train_vavae").digest == "content"


def test_formats_of_an_export(exchange, capsys):
    exchange.write_tokenizer()
    assert exchange.command("export", "tokenizer", "out.pt") == 2
    assert "no tokenizer yet" in capsys.readouterr().err
    exchange.command("import", "tokenizer", "epoch=1.ckpt")
    assert exchange.command("export", "tokenizer", "diffusers", "--format", "diffusers") == 0
    settings = json.loads((exchange.folder / "diffusers" / "config.json").read_text())
    assert (settings["sample_size"], settings["latent_channels"]) == (16, 4)
    assert exchange.command("export", "tokenizer", "flat.safetensors") == 0
    assert "linear_proj.weight" in load_file(exchange.folder / "flat.safetensors")
    assert load_released_tokenizer(exchange.folder / "flat.safetensors").config == small_models.TOKENIZER
    assert exchange.command("export", "lightningdit", "x", "--format", "diffusers") == 2
    assert "--format diffusers: only the tokenizer can be written in that format" in capsys.readouterr().err


def test_a_tokenizer_without_projection_is_imported_with_a_word_on_it(exchange, capsys, caplog):
    exchange.write_tokenizer(features=0)
    exchange.command("import", "tokenizer", "epoch=1.ckpt")
    assert caplog.messages == [
        f"{exchange.folder}/epoch=1.ckpt: no linear_proj; the evaluation of this run leaves the alignment out"
    ]
    assert capsys.readouterr().out.startswith(f"imported the tokenizer of {exchange.folder}/runs/run: ")
    assert ALIGNMENT not in exchange.run().require("train_vavae").files


def test_latents_go_out_and_into_another_run(exchange, capsys):
    exchange.write_tokenizer()
    exchange.command("import", "tokenizer", "epoch=1.ckpt")
    exchange.extract()
    assert exchange.command("export", "latents", "public") == 0
    assert exchange.command("import", "latents", "public") == 2
    assert "has its own latents; give the run another name" in capsys.readouterr().err
    other = exchange.run("name=other")
    write_shards(other.storage, "shards", other.config.shards, lambda *_: None)
    exchange.command("import", "tokenizer", "epoch=1.ckpt", "name=other")
    for _ in range(2):
        assert exchange.command("import", "latents", "public", "name=other") == 0
    assert other.plan("precompute_latents").done
    assert other.require("precompute_latents").details["imported"] == "public"
    ours, theirs = (run.storage.child(run.prefix("precompute_latents")) for run in (exchange.run(), other))
    assert read_latent_manifest(theirs).tokenizer == other.require("train_vavae").digest
    for mean, again in zip(read_statistics(ours), read_statistics(theirs), strict=True):
        assert torch.equal(mean.float(), again.float())
    record, before = other.require("precompute_latents"), theirs.sizes()
    (file, *_) = sorted((exchange.folder / "public").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["latents_flip"][-1, 0, 0, 0] = torch.nan
    save_file(tensors, file)
    assert exchange.command("import", "latents", "public", "name=other") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert f"{file.name}: latents as large as nan" in error
    assert (other.require("precompute_latents"), theirs.sizes()) == (record, before), "what was there stays"


@pytest.mark.parametrize(("model", "name"), [("tokenizer", "epoch=1.ckpt"), ("lightningdit", "model.safetensors")])
def test_weights_that_are_not_finite_are_refused_and_leave_what_was_there(exchange, capsys, model, name):
    exchange.write_tokenizer()
    exchange.command("import", "tokenizer", "epoch=1.ckpt")
    exchange.extract()
    write = {"tokenizer": exchange.write_tokenizer, "lightningdit": exchange.write_lightningdit}[model]
    write()
    assert exchange.command("import", model, name) == 0
    before = exchange.run().storage.sizes()
    path, tensor = (
        exchange.folder / name,
        {"tokenizer": "linear_proj.weight", "lightningdit": "final_layer.linear.bias"},
    )
    stored = load_file(path) if name.endswith(".safetensors") else torch.load(path)
    tensors = stored.get("state_dict", stored)
    tensors[tensor[model]].view(-1)[0] = torch.inf
    save_file(stored, path) if name.endswith(".safetensors") else torch.save(stored, path)
    capsys.readouterr()
    assert exchange.command("import", model, name) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert f"{name}: {tensor[model]}[0" in error
    assert "is inf: take another file or checkpoint" in error
    assert exchange.run().storage.sizes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"latents is [2, 3, 8, 8], expected [2, 4, 8, 8]"),
        (["latents.flip=false"], "the public layout holds mirror images too, so set latents.flip=true"),
        (["name=empty"], "no tokenizer yet"),
    ],
)
def test_latents_of_another_configuration_are_refused(exchange, capsys, words, message):
    exchange.write_tokenizer()
    exchange.command("import", "tokenizer", "epoch=1.ckpt")
    (exchange.folder / "public").mkdir()
    save_file({"latents": torch.zeros(2, 3, 8, 8)}, exchange.folder / "public" / "latents_rank00_shard000.safetensors")
    assert exchange.command("import", "latents", "public", *words) == 2
    assert message in capsys.readouterr().err
