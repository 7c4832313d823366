"""Released tokenizer checkpoints: what they compute, what is taken from them and what is refused."""

import logging

import pytest
import torch
from support import small_models
from support.golden import golden, golden_state

from vavae.errors import UserError
from vavae.interop.released_lightningdit import load_released_lightningdit
from vavae.interop.released_tokenizer import (
    load_released_alignment,
    load_released_discriminator,
    load_released_tokenizer,
    read_released_tokenizer,
    save_released_tokenizer,
)
from vavae.losses.adversarial import DiscriminatorObjective, PatchDiscriminator
from vavae.losses.config import AdversarialLossConfig, TokenizerLossConfig, VisionFoundationLossConfig
from vavae.losses.objective import LastLayers, TokenizerOutputs, tokenizer_objective
from vavae.losses.vision_foundation import VisionFoundationLoss
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TokenizerConfig

CONFIG = TokenizerConfig(
    latent_dim=8, channels=32, channel_multipliers=(1, 2), res_blocks=1, attention_levels=(1,)
)  # of the fixture


@pytest.fixture(scope="module")
def fixture():
    return golden("vavae_tiny")


@pytest.fixture
def released(fixture):
    """The fixture's checkpoint."""
    return golden_state(fixture[1])


@pytest.fixture
def saved(tmp_path):
    """Write a checkpoint; its path."""

    def save(stored):
        torch.save(stored, tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"

    return save


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(saved, released, value):
    released = {name: tensor.clone() for name, tensor in released.items()}
    for name, load in (
        ("encoder.conv_in.weight", load_released_tokenizer),
        ("linear_proj.weight", load_released_alignment),
        ("loss.discriminator.main.0.weight", load_released_discriminator),
    ):
        released[name].view(-1)[0] = value
        message = rf"model.ckpt: {name}\[0, 0, 0, 0\] is {value:g}: take another file or checkpoint$"
        with pytest.raises(UserError, match=message):
            load(saved({"state_dict": released}))
        released[name].view(-1)[0] = 0
        load(saved({"state_dict": released}))


def test_losses_and_gradients_of_the_fixture(fixture, saved, released):
    spec, tensors = fixture
    path = saved({"state_dict": released, "epoch": 3})
    autoencoder, alignment = load_released_tokenizer(path), load_released_alignment(path)
    discriminator = load_released_discriminator(path).requires_grad_(False)
    assert autoencoder.config == CONFIG
    posterior = autoencoder.encode(tensors["in.x"])
    z = posterior.at(tensors["in.eps"])
    reconstruction = autoencoder.decode(z)
    for name, value in {"mean": posterior.mean, "z": z, "reconstruction": reconstruction}.items():
        torch.testing.assert_close(value, tensors[f"out.{name}"], rtol=0, atol=1e-5)
    torch.testing.assert_close(alignment.projection(z), tensors["out.z_projected"], rtol=0, atol=1e-5)
    objective = tokenizer_objective(
        TokenizerLossConfig(adversarial=AdversarialLossConfig(layers=2)),
        TokenizerOutputs(tensors["in.x"], reconstruction, posterior.kl(), alignment(z, tensors["in.teacher_features"])),
        LastLayers(autoencoder.encoder.conv_out.weight, autoencoder.decoder.conv_out.weight),
        lambda images, restored: 0.3 * (images - restored).square().mean(dim=(1, 2, 3)),  # the stub of the fixture
        discriminator,
    )
    torch.testing.assert_close(objective.objective.detach(), tensors["out.total"], rtol=1e-5, atol=0)
    objective.objective.backward()
    gradients = {name: parameter.grad for name, parameter in autoencoder.named_parameters()}
    gradients["linear_proj.weight"] = alignment.projection.weight.grad
    for name, expected in zip(spec["grad_names"], tensors["out.grad_norms"].tolist(), strict=True):
        # A shift that the next softmax or group norm takes out has no gradient but rounding.
        assert gradients[name].norm().item() == pytest.approx(expected, rel=1e-4, abs=1e-4), name


def test_the_loss_of_the_released_discriminator(fixture, saved, released):
    tensors = fixture[1]
    objective = DiscriminatorObjective(AdversarialLossConfig(layers=2))
    objective.discriminator = load_released_discriminator(saved(released))
    terms = objective(tensors["in.x"], tensors["out.reconstruction"])
    torch.testing.assert_close(terms.objective, tensors["out.disc_loss"], rtol=0, atol=1e-5)


def test_what_training_left_beside_the_autoencoder_is_counted(saved, released, caplog):
    extra = {"loss.logvar": torch.zeros(()), "foundation_model.model.cls_token": torch.ones(1, 1, 8)}
    load_released_tokenizer(saved({"state_dict": {**released, **extra}, "optimizer_states": [{"lr": 0.1}]}))
    (record,) = caplog.records
    assert record.name.startswith("vavae")
    assert record.levelno == logging.WARNING  # seen without any setting up
    counts = "1 under linear_proj, 17 under loss, 1 under foundation_model"
    assert record.getMessage().endswith(f"dropped 19 tensors besides the autoencoder: {counts}")
    caplog.clear()
    own = {name: tensor for name, tensor in released.items() if not name.startswith(("loss.", "linear_proj."))}
    load_released_tokenizer(saved(own))
    assert not caplog.records


@pytest.mark.parametrize("suffix", ["pt", "ckpt", "safetensors"])
def test_what_is_written_comes_back_bit_for_bit(tmp_path, saved, released, suffix):
    path = saved({"state_dict": released})
    parts = load_released_tokenizer(path), load_released_alignment(path), load_released_discriminator(path)
    again = f"{tmp_path}/again.{suffix}"
    save_released_tokenizer(again, *parts)
    if suffix != "safetensors":
        state = torch.load(again)["state_dict"]
        assert state.keys() == released.keys()
        assert all(torch.equal(state[name], released[name]) for name in released)
        assert all(state[name].dtype == released[name].dtype for name in released)
    for part, load in zip(
        parts, (load_released_tokenizer, load_released_alignment, load_released_discriminator), strict=True
    ):
        state, expected = load(again).state_dict(), part.state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "config",
    [
        small_models.TOKENIZER,
        TokenizerConfig(latent_dim=4, channels=32, channel_multipliers=(1, 2, 4, 4), attention_levels=()),  # f8
        TokenizerConfig(channels=32),  # f16d32 but for its width
        TokenizerConfig(latent_dim=64, channels=32, channel_multipliers=(1, 1, 2, 2, 4, 4), attention_levels=(4, 5)),
        TokenizerConfig(latent_dim=3, channels=64, channel_multipliers=(2, 1), res_blocks=1, attention_levels=(0,)),
        TokenizerConfig(
            latent_dim=3, channels=64, channel_multipliers=(1, 1.5), attention_levels=(), middle_attention=False
        ),
        TokenizerConfig(latent_dim=3, channels=32, channel_multipliers=(1,), attention_levels=(), quant_conv=False),
        TokenizerConfig(
            latent_dim=3, channels=32, channel_multipliers=(1,), attention_levels=(), post_quant_conv=False
        ),
    ],
)
def test_every_size_is_told_by_the_tensors(saved, config):
    autoencoder = small_models.randomized(VAVAE(config))
    loaded = load_released_tokenizer(saved(autoencoder.state_dict()))
    assert loaded.config == config
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in autoencoder.state_dict().items())


@pytest.mark.parametrize("direction", ["latent_to_teacher", "teacher_to_latent"])
def test_both_directions_of_the_projection(tmp_path, direction):
    config = VisionFoundationLossConfig(projection=direction, cos_margin=0.2)
    alignment = small_models.randomized(VisionFoundationLoss(config, latent_dim=4, feature_dim=6))
    path = f"{tmp_path}/model.safetensors"
    save_released_tokenizer(path, small_models.tokenizer(), alignment)
    loaded = load_released_alignment(path, cos_margin=0.2, feature_dim=6)
    assert loaded.config == config
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in alignment.state_dict().items())


@pytest.mark.parametrize(
    "config",
    [
        AdversarialLossConfig(channels=32, layers=1),
        AdversarialLossConfig(),
        AdversarialLossConfig(channels=32, layers=2, norm="group"),
        AdversarialLossConfig(channels=32, layers=5, norm="sync_batch"),
    ],
)
def test_every_discriminator(tmp_path, config):
    discriminator = PatchDiscriminator(config)
    path = f"{tmp_path}/model.pt"
    save_released_tokenizer(path, small_models.tokenizer(), discriminator=discriminator)
    overrides = {"norm": config.norm} if config.norm == "sync_batch" else {}  # no tensor tells it from "batch"
    loaded = load_released_discriminator(path, **overrides).eval()
    images = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(images), discriminator.eval()(images))


def test_the_original_checkpoint_of_the_sd_vae(saved, released, caplog):
    """It has the names of LDM's training: a loss with its logvar, and an average under names without dots."""
    own = {name: tensor for name, tensor in released.items() if not name.startswith(("loss.", "linear_proj."))}
    average = {f"model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in own.items()}
    training = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(64, 3, 4, 4)}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    stored = {"state_dict": own | training | average | counters, "global_step": 840_000, "callbacks": {}}
    loaded = load_released_tokenizer(saved(stored)).state_dict()
    assert loaded.keys() == own.keys()
    assert all(torch.equal(loaded[name], own[name]) for name in own)
    counts = f"2 under loss, {len(own) + 2} under model_ema"
    assert caplog.records[0].getMessage().endswith(f"dropped {len(own) + 4} tensors besides the autoencoder: {counts}")


STATISTICS = {"mean": torch.arange(8.0), "std": torch.arange(1.0, 9)}
NORM = {"bn.running_mean": STATISTICS["mean"], "bn.running_var": STATISTICS["std"] ** 2}


def test_statistics_of_an_end_to_end_training(tmp_path, saved, released):
    """REPA-E keeps them in the transformer of its checkpoint, and publishes them beside the autoencoder."""
    own = {name: tensor for name, tensor in released.items() if not name.startswith(("loss.", "linear_proj."))}
    transformer = {"x_embedder.proj.weight": torch.ones(1), **NORM, "bn.num_batches_tracked": torch.tensor(7)}
    whole = read_released_tokenizer(saved({"model": {}, "ema": transformer, "vae": own, "steps": 4, "opt": {}}))
    flat = read_released_tokenizer(saved({**own, **NORM}))
    assert read_released_tokenizer(saved(own)).statistics is None
    beside = {"latents_bias": STATISTICS["mean"], "latents_scale": NORM["bn.running_var"].rsqrt()}
    torch.save({name: tensor.view(1, 8, 1, 1) for name, tensor in beside.items()}, tmp_path / "model-latents-stats.pt")
    pair = read_released_tokenizer(saved(own))
    for found in (whole, flat, pair):
        assert found.weights.tensors.keys() == own.keys()
        for name, expected in STATISTICS.items():
            torch.testing.assert_close(found.statistics[name], expected.double(), rtol=1e-6, atol=0)
    assert pair.statistics_source == "model-latents-stats.pt"
    loaded = load_released_tokenizer(saved({**own, **NORM})).state_dict()
    assert all(torch.equal(loaded[name], own[name]) for name in own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bn.running_var": torch.zeros(8)}, r"bn\.: std\[0\] is 0, expected more than 0"),
        ({"bn.running_var": -torch.ones(8)}, r"bn\.: std\[0\] is nan"),
        ({"bn.running_mean": torch.ones(32)}, r"bn\.running_mean is \[32\], expected \[8\]"),
        ({"bn.bias": torch.ones(8)}, r"bn\.bias, expected a batch normalization without weights"),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(saved, released, change, message):
    with pytest.raises(UserError, match=message):
        load_released_tokenizer(saved({**released, **NORM, **change}))


def test_a_transformer_without_its_autoencoder_is_no_tokenizer(saved):
    with pytest.raises(UserError, match="holds a mapping of ema, expected tensors by name under vae"):
        load_released_tokenizer(saved({"ema": NORM}))


TOKENIZER, ALIGNMENT, DISCRIMINATOR = load_released_tokenizer, load_released_alignment, load_released_discriminator


@pytest.mark.parametrize(
    ("load", "overrides", "message"),
    [
        (TOKENIZER, {"latent_dim": 4}, r"encoder.conv_out.weight is \[16, 64, 3, 3\], expected \[8, 64, 3, 3\]"),
        (TOKENIZER, {"channels": 64}, r"encoder.conv_in.weight is \[32, 3, 3, 3\], expected \[64, 3, 3, 3\]"),
        (TOKENIZER, {"channel_multipliers": (1, 1)}, r"encoder.down.1.block.0.conv1.weight is \[64, 32, 3, 3\]"),
        (TOKENIZER, {"res_blocks": 2}, r"no tensor encoder.down.0.block.1.norm1.weight, expected \[32\] with res_bl"),
        (TOKENIZER, {"attention_levels": ()}, r"attn.0.\w+.\w+ is .*, expected no such tensor with attention_levels"),
        (TOKENIZER, {"channels": 48}, r"channels 48 is not a multiple of norm_groups 32"),
        (ALIGNMENT, {"feature_dim": 9}, r"linear_proj.weight is \[24, 8, 1, 1\], expected \[9, 8, 1, 1\] with"),
        (ALIGNMENT, {"projection": "teacher_to_latent"}, r"linear_proj.weight is \[24, 8, 1, 1\], expected \[8, 24, 1"),
        (DISCRIMINATOR, {"layers": 3}, r"discriminator.main.8.weight is \[1, 256, 4, 4\], expected \[512, 256, 4, 4\]"),
        (DISCRIMINATOR, {"norm": "group"}, r"no tensor loss.discriminator.main.2.bias, expected \[128\] with norm"),
    ],
)  # fmt: skip
def test_an_override_that_the_tensors_contradict_is_refused_in_one_line(saved, released, load, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load(saved(released), **overrides)
    assert "\n" not in str(caught.value)


def test_an_unknown_tensor_beside_the_autoencoder_is_refused(saved, released):
    with pytest.raises(UserError, match=r"quantize.embedding.weight is \[5, 8\], expected no such tensor by the other"):
        load_released_tokenizer(saved({**released, "quantize.embedding.weight": torch.ones(5, 8)}))


@pytest.mark.parametrize(
    ("load", "name", "message"),
    [
        (TOKENIZER, "layer1.0.conv1.weight", "no tensor encoder.conv_in.weight, .* tokenizer has; .* a ResNet$"),
        (TOKENIZER, "blocks.0.adaLN_modulation.1.weight", "this looks like a LightningDiT or DiT$"),
        (TOKENIZER, "decoder.mid_block.resnets.0.conv1.weight", "looks like an AutoencoderKL of diffusers$"),
        (TOKENIZER, "a", "looks like none of the models known here: 1 tensors, such as a$"),
        (load_released_lightningdit, "decoder.mid.attn_1.q.weight", "no tensor x_embedder.proj.weight.* a tokenizer$"),
        (ALIGNMENT, "decoder.mid.attn_1.q.weight", "no tensor linear_proj.weight, .* aligned .* a tokenizer$"),
        (DISCRIMINATOR, "cls_token", "no tensor loss.discriminator.main.0.weight, .* like a vision transformer$"),
    ],
)  # fmt: skip
def test_a_foreign_checkpoint_is_told_what_it_looks_like(saved, load, name, message):
    with pytest.raises(UserError, match=message):
        load(saved({name: torch.ones(1)}))
