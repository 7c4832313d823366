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
from vavae.config import dump, load
from vavae.data.shards.write import write_shards
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.interop.export import ALIGNMENT, load_alignment, load_exported_lightningdit, load_exported_tokenizer
from vavae.interop.released_lightningdit import save_released_lightningdit
from vavae.interop.released_tokenizer import load_released_tokenizer, save_released_tokenizer
from vavae.latents.manifest import read_latent_manifest, read_latents_of
from vavae.latents.statistics import read_statistics
from vavae.losses.vision_foundation import VisionFoundationLoss
from vavae.models.dit.model import LightningDiT
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.runs.config import RunConfig
from vavae.runs.files import CONFIG
from vavae.runs.run import Run
from vavae.runs.training_inputs import begin_training
from vavae.training.session import LocalSession
from vavae.training.train import train

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

    def command(self, verb, model, name, *words, address=None):
        """Exit status of ``vavae VERB MODEL FILE --config ... WORDS``, FILE an address or a name in the folder."""
        return main([verb, model, address or str(self.folder / name), "--config", f"{self.folder}/run.yaml", *words])

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


def write_autoencoder_kl(folder, **settings):
    """An AutoencoderKL of diffusers with the sizes of the exchange's tokenizer."""
    down, up = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL(down_block_types=down, up_block_types=up, block_out_channels=(32, 32), **settings)
    small_models.randomized(model).save_pretrained(folder)
    return model


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
    autoencoder, description = load_exported_tokenizer(export)
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
    _, description = load_exported_lightningdit(exchange.run().storage.child("lightningdit/export"))
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
    assert exchange.command("export", "latents", "x", "--format", "diffusers") == 2
    assert "--format diffusers: latents are only written as released" in capsys.readouterr().err


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
        (["latents.normalization=tokenizer"], "have their own statistics, so set latents.normalization=measured"),
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


FOREIGN = ("tokenizer.quant_conv=false", "tokenizer.post_quant_conv=false")


def test_a_foreign_autoencoder_goes_the_whole_way(exchange, caplog):
    """Like FLUX's, which has a shift and no convolutions around the latent, and normalized as it is published."""
    theirs = write_autoencoder_kl(
        exchange.folder / "flux",
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.25,
        shift_factor=0.125,
    )
    words = (*FOREIGN, "latents.normalization=tokenizer", "train_lightningdit.images=16")
    assert exchange.command("import", "tokenizer", "flux", *words) == 0
    assert "scaling_factor" not in caplog.text, "nothing of it is left unused"
    run = exchange.run(*words)
    assert run.require("train_vavae").details["imported"] == "flux"
    in_process.precompute_latents(run)
    latents = run.folder("precompute_latents")
    for statistic, value in zip(read_statistics(latents), (0.125, 4.0), strict=True):
        assert statistic.tolist() == [value] * 4
    assert read_latent_manifest(latents).tokenizer == run.require("train_vavae").digest
    train(begin_training(run, "train_lightningdit", World()), LocalSession(), World())
    in_process.sample(run)
    in_process.evaluate_and_report(run)
    assert all(plan.done for plan in run.plans().values())
    metrics = json.loads(run.storage.read_bytes("metrics.json"))
    assert metrics.keys() >= {"psnr", "reconstruction_frechet_distance", "generation_frechet_distance"}
    assert "alignment_cosine" not in metrics
    measured = exchange.run(*FOREIGN, "train_lightningdit.images=16")
    assert measured.plan("train_vavae").done
    assert measured.plans()["precompute_latents"].why == "made with another configuration"

    assert exchange.command("export", "tokenizer", "again", *words, "--format", "diffusers") == 0
    settings = json.loads((exchange.folder / "again" / "config.json").read_text())
    assert (settings["latents_mean"], settings["latents_std"]) == ([0.125] * 4, [4.0] * 4)
    written = load_file(exchange.folder / "again" / "diffusion_pytorch_model.safetensors")
    assert same(written, theirs.state_dict())
    assert exchange.command("export", "tokenizer", "again.ckpt", *words) == 0
    assert "again.ckpt: statistics of the latents, which came with the tokenizer, have no place" in caplog.text

    write_autoencoder_kl(exchange.folder / "other", scaling_factor=1.0)
    assert exchange.command("import", "tokenizer", "other") == 0
    other = exchange.run()
    assert other.plans()["precompute_latents"].why == "not there yet"
    with pytest.raises(UserError, match=r"latents of the tokenizer \w+, but the run's is \w+; run precompute_latents"):
        read_latents_of(latents, other.require("train_vavae").digest, other.config.latent_shape)


def test_statistics_that_are_not_taken_are_named(exchange, caplog, capsys):
    with pytest.raises(UserError, match="this run is about to train its own: run vavae import tokenizer first"):
        exchange.run("latents.normalization=tokenizer").claim("train_vavae")
    write_autoencoder_kl(exchange.folder / "sdxl", scaling_factor=0.13025)
    assert exchange.command("import", "tokenizer", "sdxl") == 0
    message = "its statistics of latents (scaling_factor) are kept, but the diffusion takes {}; latents.normalization="
    assert message.format("the images' own") in caplog.text
    assert exchange.command("import", "tokenizer", "sdxl", "latents.scale=0.5") == 0
    assert message.format("latents.scale=0.5") in caplog.text
    exchange.write_tokenizer()
    assert exchange.command("import", "tokenizer", "epoch=1.ckpt", "latents.normalization=tokenizer") == 2
    assert "epoch=1.ckpt: no statistics of its latents: set latents.normalization=measured" in capsys.readouterr().err
    assert exchange.command("import", "tokenizer", "epoch=1.ckpt") == 0
    with pytest.raises(UserError, match="the tokenizer came without statistics of latents: take measured"):
        in_process.precompute_latents(exchange.run("latents.normalization=tokenizer"))
    assert exchange.command("import", "tokenizer", "sdxl", "latents={normalization: tokenizer, scale: 1}") == 2
    assert "scale=1 and normalization=tokenizer are two ways: leave one out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"use_quant_conv": False, "norm_num_groups": 16},
            "its norm_groups is 16, but tokenizer.norm_groups=32 is configured: set tokenizer.norm_groups=16 "
            "tokenizer.quant_conv=false\n",
        ),
        ({"layers_per_block": 2}, "its res_blocks is 2, but tokenizer.res_blocks=1 is configured: set tokenizer.res"),
    ],
)
def test_a_foreign_autoencoder_of_another_architecture_is_refused_with_the_remedy(exchange, capsys, settings, message):
    write_autoencoder_kl(exchange.folder / "foreign", **settings)
    assert exchange.command("import", "tokenizer", "foreign") == 2
    error = capsys.readouterr().err.splitlines()[-1] + "\n"
    assert message in error
    assert exchange.run().artifact("train_vavae") is None
    words = [word for word in error.split("set ")[1].split() if "=" in word]
    assert exchange.command("import", "tokenizer", "foreign", *words) == 0


def test_an_autoencoder_on_the_hub(exchange, capsys, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def snapshot_download(repository, revision, allow_patterns, ignore_patterns):
        asked.append((repository, revision, allow_patterns[0]))
        if repository == "owner/offline":
            raise LocalEntryNotFoundError("no connection\nand no cache")
        return str(exchange.folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    write_autoencoder_kl(exchange.folder / "vae", scaling_factor=1.0)
    assert exchange.command("import", "tokenizer", "", address="hf-hub:owner/name/vae@v1.0") == 0
    assert exchange.run().require("train_vavae").details["imported"] == "vae@v1.0"
    assert exchange.command("import", "tokenizer", "", address="hf-hub:owner/offline") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "hf-hub:owner/offline is neither in the cache" in error
    assert asked == [("owner/name", "v1.0", "vae/*.json"), ("owner/offline", None, "*.json")]
    assert exchange.command("import", "tokenizer", "", address="hf-hub:name") == 2
    assert "hf-hub:name: write hf-hub:owner/name, or hf-hub:owner/name/folder@revision" in capsys.readouterr().err


@pytest.mark.parametrize("pushed", [False, True])
def test_models_of_another_run_and_of_one_that_was_pushed(exchange, pushed, capsys):
    tokenizer, lightningdit = exchange.write_tokenizer(), exchange.write_lightningdit()
    assert exchange.command("import", "tokenizer", "epoch=1.ckpt") == 0
    exchange.extract()
    assert exchange.command("import", "lightningdit", "model.safetensors") == 0
    source, second = exchange.run().storage.url(), exchange.run("name=second")
    exchange.run().storage.write_bytes(CONFIG, dump(exchange.config).encode())
    if pushed:
        source, configuration = str(exchange.folder / "pushed"), str(exchange.folder / "run.yaml")
        assert main(["push", configuration, "me/run", "--out", source]) == 0
        assert "tokenizer: imported from epoch=1.ckpt" in (exchange.folder / "pushed" / "README.md").read_text()
    write_shards(second.storage, "shards", exchange.config.shards, lambda *_: None)
    assert exchange.command("import", "tokenizer", "", "name=second", address=source) == 0
    export = second.folder("train_vavae")
    found, _ = load_exported_tokenizer(export)
    assert same(found.state_dict(), tokenizer)
    first = exchange.run().folder("train_vavae")
    assert same(load_alignment(export).state_dict(), load_alignment(first).state_dict())
    measured = read_statistics(exchange.run().folder("precompute_latents"))
    assert all(map(torch.equal, read_statistics(export), measured))
    in_process.precompute_latents(second)
    address = source if pushed else f"{source}/lightningdit/export"
    for wrong, message in {
        "lightningdit.depth=2": "its lightningdit.depth is 1, but 2 is configured: set it so",
        "lightningdit.qk_norm=false": "its lightningdit.qk_norm is True, but False is configured",
    }.items():
        assert exchange.command("import", "lightningdit", "", "name=second", wrong, address=address) == 2
        assert message in capsys.readouterr().err
    assert exchange.command("import", "lightningdit", "", "name=second", address=address) == 0
    found, _ = load_exported_lightningdit(second.folder("train_lightningdit"))
    assert same(found.state_dict(), lightningdit)
