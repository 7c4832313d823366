"""The recipes of `configs/imagenet`: what they resolve to, what they promise, and that they can be planned offline."""

import re
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml

from ray_jobs import pipeline
from ray_jobs.runtime import command
from vavae.config import load
from vavae.losses.adversarial import PatchDiscriminator
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TokenizerConfig
from vavae.runs.config import RunConfig
from vavae.runs.phases import resolve_phases

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted((CONFIGS / "imagenet").glob("*.yaml"))
BEYOND = sorted((CONFIGS / "imagenet" / "beyond").glob("*.yaml"))
BATCHES_OF_AN_EPOCH, TOKENIZER_BATCH, LIGHTNINGDIT_BATCH = 5005, 256, 1024
EPOCH = BATCHES_OF_AN_EPOCH * TOKENIZER_BATCH

TABLE_2 = {
    # rFID, PSNR, LPIPS, SSIM; FID-10K of B, L, XL
    "f16d16": "0.49 26.10 0.132 0.72 16.24 9.49 8.28",
    "f16d16_mae": "0.51 26.01 0.137 0.71 16.86 10.93 9.19",
    "f16d16_dinov2": "0.55 25.29 0.147 0.69 15.79 10.02 8.71",
    "f16d32": "0.26 28.59 0.089 0.80 22.62 12.86 10.92",
    "f16d32_mae": "0.28 28.33 0.091 0.80 19.89 11.51 9.92",
    "f16d32_dinov2": "0.28 27.96 0.096 0.79 15.82 9.82 8.22",
    "f16d64": "0.17 31.03 0.055 0.88 36.83 20.73 17.24",
    "f16d64_mae": "0.15 31.03 0.054 0.87 23.58 14.40 11.69",
    "f16d64_dinov2": "0.14 30.71 0.055 0.87 24.00 14.95 11.98",
}
PROMISES = {
    **TABLE_2,
    "f16d32_dinov2_stages": "0.28",
    "lightningdit_xl_64_epochs": "2.11 4.16 252.3 0.81 0.58 5.14 4.22 130.2 0.76 0.62",
    "lightningdit_xl_800_epochs": "1.35 4.15 295.3 0.79 0.65 2.17 4.36 205.6 0.77 0.65",
    "lightningdit_b_64_epochs": "no such row 7.30 4.44",
    "lightningdit_b_800_epochs": "no such row 4.44",
    "sd_vae_f8d4": "7.13 0.61",
}
"""What the opening comment of each recipe says, in this order."""
LIGHTNINGDITS = {
    # size, patch, steps, first image of the uniform law, guarded against divergence, guidance scale and start
    "lightningdit_b_64_epochs": ("B", 1, 80_000, None, False, 10, 0.1),
    "lightningdit_xl_64_epochs": ("XL", 1, 80_000, None, False, 10, 0.1),
    "lightningdit_b_800_epochs": ("B", 1, 1_000_000, 600_000 * LIGHTNINGDIT_BATCH, True, 6.7, 0.125),
    "lightningdit_xl_800_epochs": ("XL", 1, 1_000_000, 600_000 * LIGHTNINGDIT_BATCH, True, 6.7, 0.125),
    "sd_vae_f8d4": ("XL", 2, 100_000, None, False, 1, 0),
    "f16d32_dinov2_stages": ("B", 1, 200_000, None, False, 1, 0),
    **{name: ("B", 1, 200_000, None, False, 1, 0) for name in TABLE_2},
}
TEACHERS = {"mae": "mae_large", "dinov2": "dinov2_large"}


def recipe(name):
    return load(RunConfig, CONFIGS / "imagenet" / f"{name}.yaml")


def laid_over(tmp_path, *presets):
    """The quickstart with presets laid over it, as a run would name them."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"defaults": [str(CONFIGS / name) for name in ("quickstart.yaml", *presets)]}))
    return load(RunConfig, file)


def test_these_are_the_recipes():
    assert [path.stem for path in RECIPES] == sorted(PROMISES) == sorted(LIGHTNINGDITS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_opens_with_the_result_it_should_reach_and_its_command(path):
    comment = " ".join(
        line.removeprefix("#").strip() for line in re.match(r"(#.*\n)+", path.read_text())[0].splitlines()
    )
    assert f"python -m ray_jobs.pipeline --config configs/imagenet/{path.name}" in comment
    for words in re.findall(r"[\d.]+|[a-z ]+[a-z]", PROMISES[path.stem]):
        assert re.search(rf"(?<![\d.]){re.escape(words)}(?![\d])", comment), words


@pytest.mark.parametrize("path", BEYOND, ids=lambda path: path.stem)
def test_recipes_beyond_the_paper_open_with_source_figure_command_and_cost(path):
    comment = re.match(r"(#.*\n)+", path.read_text())[0]
    assert re.search(r"arXiv \d{4}\.\d{5}", comment)
    assert re.search(r"FID-50K", comment)
    assert f"python -m ray_jobs.pipeline --config configs/imagenet/beyond/{path.name}\n" in comment
    assert re.search(r"# Cost: .*\d", comment)
    assert load(RunConfig, path).name == path.stem


@pytest.mark.parametrize("name", PROMISES)
def test_all_train_with_the_published_optimizers_and_batches(name):
    config = recipe(name)
    vavae, lightningdit = config.train_vavae, config.train_lightningdit
    assert config.name == name
    assert (config.shards.image_size, config.stream.lanes, config.stream.flip) == (256, 32, False)
    assert (vavae.batch_size, lightningdit.batch_size) == (TOKENIZER_BATCH, LIGHTNINGDIT_BATCH)
    assert (vavae.optimizer.learning_rate, vavae.optimizer.betas) == (1e-4, (0.5, 0.9))
    assert (lightningdit.optimizer.learning_rate, lightningdit.optimizer.betas) == (2e-4, (0.9, 0.95))
    assert vavae.optimizer.weight_decay == lightningdit.optimizer.weight_decay == 0
    assert vavae.schedule == lightningdit.schedule == type(vavae.schedule)()
    assert (vavae.ema_decay, lightningdit.ema_decay) == (None, 0.9999)
    assert vavae.optimizer.max_grad_norm is None
    assert (vavae.precision, lightningdit.precision) == ("fp32", "bf16")
    assert config.latents.flip
    assert (config.timesteps.law, config.timesteps.mean, config.timesteps.std) == ("logit_normal", 0, 1)
    assert (config.objective.direction_weight, config.objective.label_dropout) == (1, 0.1)


@pytest.mark.parametrize("name", [name for name in PROMISES if name != "sd_vae_f8d4"])
def test_tokenizers_and_their_losses_are_the_published_ones(name):
    config = recipe(name)
    dim, teacher = (
        re.fullmatch(r"f16d(\d+)_?([a-z0-9]*)(?:_stages)?", name).groups() if name[0] == "f" else (32, "dinov2")
    )
    losses = config.losses
    assert config.tokenizer == TokenizerConfig(
        latent_dim=int(dim), channels=128, channel_multipliers=(1, 1, 2, 2, 4), res_blocks=2, attention_levels=(4,)
    )
    assert (losses.perceptual.kind, losses.perceptual.weight, losses.kl_weight) == ("lpips", 1, 1e-6)
    adversarial = losses.adversarial
    assert (adversarial.weight, adversarial.start_images, adversarial.loss) == (0.5, 2501 * TOKENIZER_BATCH, "hinge")
    assert (adversarial.channels, adversarial.layers, adversarial.norm) == (64, 3, "batch")
    assert (losses.adaptive.adversarial_max, losses.adaptive.vision_foundation_max) == (1e4, 1e8)
    if not teacher:
        assert losses.vision_foundation.weight == 0
        return
    aligned = losses.vision_foundation
    assert (config.teacher.name, config.teacher.normalize) == (TEACHERS[teacher], False)
    assert (aligned.cos_weight, aligned.distmat_weight, aligned.adaptive) == (1, 1, True)
    assert aligned.projection == "latent_to_teacher"
    if name in TABLE_2:
        assert (aligned.weight, aligned.cos_margin, aligned.distmat_margin) == (0.1, 0.5, 0.25)


@pytest.mark.parametrize("name", TABLE_2)
def test_tokenizers_of_table_2_train_for_50_epochs(name):
    assert recipe(name).train_vavae.images == 50 * EPOCH


STAGED = ["f16d32_dinov2_stages", *(name for name in LIGHTNINGDITS if name.startswith("lightningdit"))]


@pytest.mark.parametrize("name", STAGED)
def test_the_released_tokenizer_has_three_stages(name):
    config = recipe(name)
    training = config.train_vavae
    stages = resolve_phases(training.stages, config.losses, training.frozen, training.images)
    assert [stage.from_images for stage in stages] == [0, 100 * EPOCH, 115 * EPOCH]
    assert [stage.until_images for stage in stages] == [100 * EPOCH, 115 * EPOCH, 130 * EPOCH]
    aligned = [stage.losses.vision_foundation for stage in stages]
    assert [loss.weight for loss in aligned] == [0.5, 0.1, 0.1]
    assert [loss.cos_margin for loss in aligned] == [0, 0, 0.5]
    assert [loss.distmat_margin for loss in aligned] == [0, 0, 0.25]
    # The discriminator comes in half an epoch after the start and stays: the later stages begin with it.
    assert {stage.losses.adversarial.start_images for stage in stages} == {2501 * TOKENIZER_BATCH}
    others = {stage.losses.model_copy(update={"vision_foundation": aligned[0]}) for stage in stages}
    assert len(others) == 1
    assert not any(stage.frozen for stage in stages)


def test_stages_are_one_line_of_a_run_and_change_nothing_else(tmp_path):
    plain, staged = (laid_over(tmp_path, f"presets/losses/{name}.yaml") for name in ("released", "released_stages"))
    schedule = {"images": plain.train_vavae.images, "stages": ()}
    assert staged.model_copy(update={"train_vavae": staged.train_vavae.model_copy(update=schedule)}) == plain


@pytest.mark.parametrize(("name", "expected"), LIGHTNINGDITS.items())
def test_lightningdits_are_trained_and_sampled_as_published(name, expected):
    size, patch, steps, uniform_after, guarded, scale, start = expected
    config = recipe(name)
    model = config.lightningdit
    assert (model.size, model.patch_size) == (size, patch)
    assert (model.mlp, model.norm, model.rope, model.shift) == ("swiglu", "rmsnorm", True, True)
    assert (model.qk_norm, config.train_lightningdit.optimizer.max_grad_norm) == (
        (True, 1) if guarded else (False, None)
    )
    assert config.train_lightningdit.steps == steps
    assert config.timesteps.uniform_after_images == uniform_after
    assert (config.guidance.scale, config.guidance.interval) == (scale, (start, 1))
    if scale == 1:
        assert (config.solver.name, config.solver.shift) == ("heun", 1)
        assert config.sample.images == (50_000 if name == "sd_vae_f8d4" else 10_000)
    else:
        assert (config.solver.name, config.solver.num_steps, config.solver.shift) == ("euler", 249, 0.3)
        assert (config.guidance.channels, config.sample.images) == (3, 50_000)


def test_latents_of_sd_vae_make_as_many_tokens_as_those_of_va_vae():
    config = recipe("sd_vae_f8d4")
    assert config.losses.vision_foundation.weight == 0
    assert config.latents.scale == 0.18215
    assert (config.latent_shape, config.lightningdit.patch_size) == ((4, 32, 32), 2)


def test_released_and_paper_are_one_line_of_a_run(tmp_path):
    before = laid_over(tmp_path)
    paper, released = (laid_over(tmp_path, f"presets/losses/{name}.yaml") for name in ("paper", "released"))
    assert before.losses.adversarial.start_images == paper.losses.adversarial.start_images == 16_000
    assert released.losses.adversarial.start_images == 2501 * TOKENIZER_BATCH
    assert (paper.teacher.normalize, released.teacher.normalize) == (True, False)
    for config in (paper, released):
        aligned = config.losses.vision_foundation
        assert (aligned.weight, aligned.cos_margin, aligned.distmat_margin) == (0.1, 0.5, 0.25)
        assert config.tokenizer == before.tokenizer
    guarded, unguarded = before, laid_over(tmp_path, "presets/lightningdit/released.yaml")
    assert (guarded.lightningdit.qk_norm, unguarded.lightningdit.qk_norm) == (True, False)
    assert (
        guarded.train_lightningdit.optimizer.max_grad_norm,
        unguarded.train_lightningdit.optimizer.max_grad_norm,
    ) == (
        1,
        None,
    )


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def tokenizer_preset(name, **changes):
    written = load_section(CONFIGS / "presets" / "tokenizer" / f"{name}.yaml")
    return TokenizerConfig(**{**written, **changes})


def load_section(path):
    """The section `tokenizer` of a preset and of those that it is laid over."""
    tree = yaml.safe_load(path.read_text())
    below = load_section(path.parent / tree["defaults"]) if "defaults" in tree else {}
    return {**below, **tree["tokenizer"]}


@pytest.mark.parametrize(
    ("preset", "encoder", "decoder", "total"),
    [("f16d32", "28.41", "41.42", "69.84"), ("f8", "34.16", "49.49", "83.65")],
)
def test_tokenizer_presets_have_the_published_numbers_of_parameters(preset, encoder, decoder, total):
    with torch.device("meta"):
        vavae = VAVAE(tokenizer_preset(preset))
    counts = [parameters(part) / 1e6 for part in (vavae.encoder, vavae.decoder, vavae)]
    assert [f"{count:.2f}" for count in counts] == [encoder, decoder, total]


@pytest.mark.parametrize("latent_dim", [16, 64])
def test_another_latent_dimension_changes_four_layers_alone(latent_dim):
    with torch.device("meta"):
        published, other = (VAVAE(tokenizer_preset(f"f16d{dim}")) for dim in (32, latent_dim))
    changed = {
        name.removesuffix(".weight")
        for (name, a), b in zip(published.named_parameters(), other.parameters(), strict=True)
        if a.shape != b.shape and name.endswith("weight")
    }
    assert changed == {"encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in"}


def test_the_discriminator_has_the_published_number_of_parameters():
    with torch.device("meta"):
        assert f"{parameters(PatchDiscriminator(recipe('f16d32').losses.adversarial)) / 1e6:.2f}" == "2.77"


@pytest.mark.parametrize("latent_dim", [4, 32, 100])
@pytest.mark.parametrize(("preset", "factor"), [("f8", 8), ("f16", 16), ("f32", 32)])
def test_any_factor_takes_any_latent_dimension(preset, factor, latent_dim):
    config = tokenizer_preset(preset, latent_dim=latent_dim)
    with torch.device("meta"):
        vavae = VAVAE(config)
        posterior = vavae.encode(torch.zeros(2, 3, 256, 128))
        assert config.downsample == factor
        assert posterior.mean.shape == (2, latent_dim, 256 // factor, 128 // factor)
        assert vavae.decode(posterior.mean).shape == (2, 3, 256, 128)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, no pretrained weights, no images; the working directory is an empty folder."""

    def refuse(*_, **__):
        raise AssertionError("nothing may be asked of the network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(command, "cluster", refuse)
    monkeypatch.chdir(tmp_path)


def run(path, *arguments):
    return command.pipeline("test", pipeline.JOB_FUNCTIONS, ["--config", str(path), *arguments])


@pytest.mark.parametrize("path", [*RECIPES, *BEYOND], ids=lambda path: path.stem)
def test_each_recipe_can_be_planned_offline_and_says_what_to_fetch(path, offline, capfd):
    config = load(RunConfig, path)
    assert run(path, "--dry-run") == 0
    out = capfd.readouterr().out
    assert f"{config.train_lightningdit.images:,} images" in out
    needed = [line.removeprefix("still needed: ") for line in out.splitlines() if line.startswith("still needed: ")]
    assert needed[0].startswith("shards: source 'imagenet/train' is not there: give a folder of images or of class")
    assert needed[1].startswith("shards: source 'imagenet/val' is not there")
    networks = {"losses.perceptual": "vgg16"}
    if config.teacher.name in TEACHERS.values():
        networks["teacher"] = "vit_large"
    if config.losses.adversarial.kind == "features":
        networks["losses.adversarial.features"] = "vit_small_patch8_224.dino"
    for section, network in networks.items():
        (line,) = (line for line in needed if line.startswith(f"{section}: the weights of {network}"))
        assert re.search(r"download https://\S+/model.safetensors where there is a connection", line)
    inception, reference = needed[-2:]
    assert re.match(r"evaluate.metrics: the weights of Inception .* download https://\S+-6726825d.pth where", inception)
    assert re.match(r"evaluate.reference=imagenet/VIRTUAL\S+: no file there; ADM's .* is https://\S+.npz$", reference)
    stored, frozen = config.latents.features is not None, config.tokenizer.encoder is not None
    assert len(needed) == 4 + len(networks) + stored + frozen


def test_without_images_a_run_refuses_in_one_line(offline, capfd):
    assert run(RECIPES[0]) == 2
    assert re.fullmatch(r"error: source 'imagenet/train' is not there: give .*\n", capfd.readouterr().err)


def test_without_weights_a_run_refuses_in_one_line_before_ray_starts(offline, capfd, tmp_path):
    arguments = ["shards.source=digits", "shards.validation_source=null", "shards.image_size=64"]
    assert run(CONFIGS / "imagenet" / "f16d32_dinov2.yaml", *arguments) == 2
    error = capfd.readouterr().err
    assert re.fullmatch(r"error: teacher: the weights of vit_large\S+ .* download https://\S+ .*\n", error)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("teacher.name=vit_large_patch15", "vit_large_patch15"),
        ("teacher.stage_stride=5", "stage_stride is one of"),
    ],
)
def test_a_teacher_that_cannot_be_is_an_error_even_when_planning(teacher, message, offline, capfd):
    assert run(CONFIGS / "quickstart.yaml", "--dry-run", teacher) == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", capfd.readouterr().err)
