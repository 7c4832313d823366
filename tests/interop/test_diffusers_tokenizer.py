"""The tokenizer as a folder of diffusers and back: what diffusers itself computes, and what can't be read."""

import json
import logging
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import vavae.torchvision_compat  # noqa: F401  (before diffusers)
from vavae.errors import UserError
from vavae.interop.diffusers_tokenizer import (
    load_diffusers_tokenizer,
    read_diffusers_tokenizer,
    save_diffusers_tokenizer,
)
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TokenizerConfig
from vavae.randomness import torch_generator
from vavae.storage.storage import Storage

AutoencoderKL = pytest.importorskip("diffusers").AutoencoderKL
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"

CONFIGS = [
    TokenizerConfig(latent_dim=4, channels=32, channel_multipliers=(1, 2), res_blocks=1, attention_levels=(1,)),
    TokenizerConfig(latent_dim=3, channels=32, channel_multipliers=(1, 1, 2), attention_levels=(0, 2)),
    TokenizerConfig(
        latent_dim=4, channels=32, channel_multipliers=(1, 3, 1), res_blocks=1, attention_levels=(), norm_groups=4
    ),
    TokenizerConfig(
        latent_dim=4,
        image_channels=4,
        channels=32,
        channel_multipliers=(1, 1.5),
        res_blocks=1,
        attention_levels=(),
        norm_groups=16,
        middle_attention=False,
        quant_conv=False,
        post_quant_conv=False,
    ),
]

NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
VARIANTS = {
    "sd": {"channels": (32, 64, 128, 128), "layers_per_block": 2},
    "sdxl": {"scaling_factor": 0.13025, "force_upcast": True, "sample_size": 1024},
    "sd3": {"latent_channels": 16, **NO_QUANT, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "encoder's convolution alone": {"use_post_quant_conv": False},
    "decoder's convolution alone": {"use_quant_conv": False},
    "no attention": {"mid_block_add_attention": False, **NO_QUANT},
    "attention": {"channels": (32, 64, 64), "attention": (0, 2)},
    "no multiples": {"channels": (48, 32, 80), "norm_num_groups": 16},
    "groups": {"norm_num_groups": 4},
    "one level": {"channels": (32,)},
    "gray": {"in_channels": 1, "out_channels": 1, "act_fn": "swish"},
    "transparent": {"in_channels": 4, "out_channels": 4},
}


def varied(model):
    """A module in evaluation mode with keyed weights, whose norms and biases do something, too."""
    for name, parameter in model.requires_grad_(False).named_parameters():
        noise = torch.randn(parameter.shape, generator=torch_generator(0, name))
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
    return model.eval()


def autoencoder_kl(channels=(32, 64), attention=(), **settings):
    """An AutoencoderKL of diffusers, by the channels of its levels and those that have attention."""
    kinds = ["Attn" * (level in attention) + "{}" for level in range(len(channels))]
    model = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=[kind.format("DownEncoderBlock2D") for kind in kinds],
        up_block_types=[kind.format("UpDecoderBlock2D") for kind in reversed(kinds)],
        **settings,
    )
    return varied(model)


def saved(folder, model=None, **options):
    (autoencoder_kl() if model is None else model).save_pretrained(folder, **options)
    return folder


def change(folder, **settings):
    """Set keys of the configuration; None deletes one."""
    path = folder / CONFIG
    values = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def rewrite(folder, tensors):
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        folder / WEIGHTS,
    )


def equal(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_same_computation(ours, theirs):
    """Moments, a sample with given noise, and its images to 1e-5."""
    channels, downsample = ours.config.image_channels, ours.config.downsample
    images = torch.rand(2, channels, 2 * downsample, 3 * downsample, generator=torch_generator(0, "images")) * 2 - 1
    with torch.no_grad():
        posterior, expected = ours.encode(images), theirs.encode(images).latent_dist
        z = posterior.sample(torch_generator(1, "noise"))
        torch.testing.assert_close(posterior.mean, expected.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=0, atol=1e-5)
        torch.testing.assert_close(z, expected.sample(torch_generator(1, "noise")), rtol=0, atol=1e-5)
        decoded = ours.decode(z)
        torch.testing.assert_close(decoded, theirs.decode(z).sample, rtol=0, atol=1e-5)
    assert posterior.mean.std() > 0.1, "small numbers prove little"
    assert decoded.std() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_diffusers_saves_computes_the_same_here(tmp_path, variant):
    theirs = autoencoder_kl(**VARIANTS[variant])
    ours = load_diffusers_tokenizer(saved(tmp_path, theirs))
    assert_same_computation(ours, theirs)
    assert sum(tensor.numel() for tensor in ours.parameters()) == sum(map(torch.numel, theirs.parameters()))


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_written_computes_the_same_in_diffusers_and_comes_back_bit_for_bit(tmp_path, config):
    autoencoder = varied(VAVAE(config))
    save_diffusers_tokenizer(str(tmp_path / "ours"), autoencoder, image_size=16)
    theirs, report = AutoencoderKL.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert (theirs.config.scaling_factor, theirs.config.sample_size) == (1, 16)
    assert_same_computation(autoencoder, theirs)
    again = load_diffusers_tokenizer(saved(tmp_path / "theirs", theirs))
    assert again.config == config
    assert equal(again, autoencoder)


def test_names_before_diffusers_018_and_convolutions_as_attention(tmp_path):
    theirs = autoencoder_kl(attention=(1,))
    expected = load_diffusers_tokenizer(saved(tmp_path, theirs))
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {
        re.sub(r"to_q|to_k|to_v|to_out\.0", lambda name: former[name[0]], name): tensor
        for name, tensor in theirs.state_dict().items()
    }
    assert len(renamed.keys() - theirs.state_dict().keys()) == 8 * 5, "five blocks of attention, weights and biases"
    rewrite(tmp_path, renamed)
    assert equal(load_diffusers_tokenizer(tmp_path), expected)
    assert equal(AutoencoderKL.from_pretrained(tmp_path), theirs)
    name = "encoder.mid_block.attentions.0.query.weight"
    rewrite(tmp_path, {**renamed, name: renamed[name][:, :, None, None]})
    assert equal(load_diffusers_tokenizer(tmp_path), expected)
    rewrite(tmp_path, {**renamed, name.replace("query", "to_q"): renamed[name]})
    with pytest.raises(UserError, match=r"attentions\.0\.(query|to_q)\.weight are the same tensor"):
        load_diffusers_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"safe_serialization": False},
        {"max_shard_size": "200KB"},
        {"variant": "fp16"},
        {"variant": "fp16", "max_shard_size": "100KB"},
        {"safe_serialization": False, "max_shard_size": "200KB"},
    ],
)
def test_every_file_format(tmp_path, options):
    theirs = autoencoder_kl()
    if "variant" in options:
        theirs = theirs.half()
    saved(tmp_path, theirs, **options)
    if "max_shard_size" in options:
        assert len(list(tmp_path.glob("*-of-*"))) > 1
    ours = load_diffusers_tokenizer(tmp_path)
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {theirs.dtype}
    assert_same_computation(ours.float(), theirs.float())


def test_full_precision_comes_first_and_a_file_can_be_named(tmp_path):
    theirs = autoencoder_kl()
    saved(tmp_path, theirs)
    expected = load_diffusers_tokenizer(tmp_path)
    for variant, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        saved(tmp_path, autoencoder_kl().to(dtype), variant=variant)
    torch.save({"of": "another model"}, tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / f"{WEIGHTS}.index.json").write_text("{}")
    assert equal(load_diffusers_tokenizer(tmp_path), expected)
    named = load_diffusers_tokenizer(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert named.quant_conv.weight.dtype == torch.float16
    for path in (WEIGHTS, f"{WEIGHTS}.index.json", "diffusion_pytorch_model.bin"):
        (tmp_path / path).unlink()
    with pytest.raises(UserError, match=r"several ways, .*\.bf16\.s.*, .*\.fp16\.safetensors; give the path of one"):
        load_diffusers_tokenizer(tmp_path)


def test_a_folder_in_storage(tmp_path):
    theirs, storage = autoencoder_kl(), Storage(f"memory://{tmp_path.name}")
    for path in saved(tmp_path, theirs).iterdir():
        storage.put_file(path, path.name)
    assert equal(load_diffusers_tokenizer(storage.url()), load_diffusers_tokenizer(tmp_path))


def test_statistics_that_come_with_an_autoencoder(tmp_path):
    def statistics(**settings):
        change(tmp_path, **settings)
        found = read_diffusers_tokenizer(tmp_path)
        return found.statistics and {name: tensor.tolist() for name, tensor in found.statistics.items()}

    saved(tmp_path)
    assert statistics() == {"mean": [0.0] * 4, "std": [1 / 0.18215] * 4}, "the default of diffusers"
    assert statistics(shift_factor=0.1, scaling_factor=0.5) == {"mean": [0.1] * 4, "std": [2.0] * 4}
    assert statistics(shift_factor=None, scaling_factor=1.0) is None
    given = {"mean": [1.0, 2.0, 3.0, 4.0], "std": [0.1, 0.2, 0.3, 0.7]}
    assert statistics(latents_mean=given["mean"], latents_std=given["std"]) == given
    for settings, keys in (({}, {"latents_mean", "latents_std"}), ({"latents_mean": None, "latents_std": None}, set())):
        change(tmp_path, scaling_factor=0.18215 if not keys else 1.0, **settings)
        source = read_diffusers_tokenizer(tmp_path)
        save_diffusers_tokenizer(str(tmp_path / "again"), load_diffusers_tokenizer(tmp_path), 16, source.statistics)
        again = read_diffusers_tokenizer(tmp_path / "again").statistics
        assert all(torch.equal(again[name], source.statistics[name]) for name in given)
        written = json.loads((tmp_path / "again" / CONFIG).read_text())
        assert {key for key in written if key.startswith("latents_")} == keys
        assert (written["scaling_factor"] == 0.18215) == (not keys)
    with pytest.raises(UserError, match=r"std\[1\] is 0, expected more than 0"):
        statistics(latents_std=[1, 0, 1, 1])
    with pytest.raises(UserError, match="latents_std are not of latent_channels=4 numbers"):
        statistics(latents_std=[1])
    batch_norm = {"bn.running_mean": torch.arange(4.0), "bn.running_var": torch.arange(1.0, 5) ** 2}
    rewrite(tmp_path, load_file(tmp_path / WEIGHTS) | batch_norm | {"bn.num_batches_tracked": torch.tensor(3)})
    assert statistics() == {"mean": [0, 1, 2, 3], "std": [1, 2, 3, 4]}, "of the tensors before those of the settings"
    rewrite(tmp_path, load_file(tmp_path / WEIGHTS) | {"bn.weight": torch.ones(4)})
    with pytest.raises(UserError, match=r"bn\.weight, expected a batch normalization without weights"):
        statistics()
    rewrite(tmp_path, load_file(tmp_path / WEIGHTS) | {"bn.running_mean": torch.ones(16)})
    with pytest.raises(UserError, match=r"bn\.running_mean is \[16\], expected \[4\]"):
        statistics()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({"_class_name": name}, f"config.json: a model of the class {name}; of diffusers only an AutoencoderKL can")
            for name in ("AutoencoderTiny", "AutoencoderDC", "VQModel", "AsymmetricAutoencoderKL", "AutoencoderKLFlux2")
        ),
        ({"_class_name": None}, "a model of the class None"),
        ({"act_fn": "mish"}, "act_fn: Input should be 'silu' or 'swish'; not supported"),
        ({"double_z": False}, "double_z: Input should be True; not supported"),
        ({"down_block_types": ["DownBlock2D"] * 2}, r"down_block_types\.0: Input should be 'DownEncoderBlock2D' or"),
        ({"block_out_channels": [32]}, "up_block_types and block_out_channels differ in length"),
        ({"block_out_channels": [0, 32]}, r"block_out_channels\.0: Input should be greater than 0"),
        ({"up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]}, r"levels \[\] of the encoder, but \[1\] of"),
        ({"out_channels": 1}, "in_channels 3, but out_channels 1: not supported"),
        ({"in_channels": 2, "out_channels": 2}, "image_channels: Input should be 1, 3 or 4; not supported"),
        ({"norm_num_groups": 5}, "channels 32 is not a multiple of norm_groups 5; not supported"),
        ({"latent_channels": 8}, r"conv_out.weight is \[8, 64, 3, 3\], expected \[16, 64, 3, 3\] with latent_dim=8"),
        ({"mid_block_add_attention": False}, r"mid_block.attentions.0.\S+ is .*, expected no such tensor"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
    ],
)  # fmt: skip
def test_what_is_no_tokenizer_here_is_refused_in_one_line(tmp_path, settings, message):
    change(saved(tmp_path), **settings)
    with pytest.raises(UserError, match=message) as caught:
        load_diffusers_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_folders_are_refused_by_the_names_in_the_file(tmp_path, caplog):
    tensors = load_file(saved(tmp_path) / WEIGHTS)
    name = "decoder.mid_block.attentions.0.to_out.0.weight"
    for changed, message in (
        (
            {key: tensor for key, tensor in tensors.items() if key != name},
            rf"no tensor {name}, expected \[64, 64, 1, 1",
        ),
        (tensors | {"quantize.embedding.weight": torch.ones(5, 8)}, r"quantize.embedding.weight is \[5, 8\], expected"),
        (tensors | {name: tensors[name].fill_(torch.inf)}, rf"{name}\[0, 0, 0, 0\] is inf"),
    ):
        rewrite(tmp_path, changed)
        with pytest.raises(UserError, match=message):
            load_diffusers_tokenizer(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"no {WEIGHTS} there, nor other weights of diffusers"):
        load_diffusers_tokenizer(tmp_path)
    saved(tmp_path, max_shard_size="200KB")
    index = tmp_path / f"{WEIGHTS}.index.json"
    index.write_text(index.read_text().replace("quant_conv.bias", "quant_conv.shift"))
    with pytest.raises(UserError, match=r"index.json: no tensor (post_)?quant_conv.shift in diffusion_pytorch_model-0"):
        load_diffusers_tokenizer(tmp_path)
    index.write_text("{}")
    with pytest.raises(UserError, match=r"index\.json: no index of files of weights"):
        load_diffusers_tokenizer(tmp_path)
    change(tmp_path, use_flow=True)
    with pytest.raises(UserError, match="no index"):
        load_diffusers_tokenizer(tmp_path)
    (record,) = (record for record in caplog.records if record.name.startswith("vavae"))
    message = f"{tmp_path}/config.json: no effect of use_flow, which an AutoencoderKL does not have"
    assert (record.levelno, record.getMessage()) == (logging.WARNING, message)
    (tmp_path / CONFIG).rename(tmp_path / "model_index.json")
    with pytest.raises(UserError, match=f"config.json: no such file; take {tmp_path}/vae$"):
        load_diffusers_tokenizer(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: no such file; give the folder of an AutoencoderKL"):
        load_diffusers_tokenizer(tmp_path)


def test_an_architecture_that_diffusers_does_not_have_is_refused(tmp_path):
    config = TokenizerConfig(channels=32, channel_multipliers=(2, 1), attention_levels=())
    with pytest.raises(UserError, match=r"channel_multipliers starts with 2: .* so it starts with 1$"):
        save_diffusers_tokenizer(str(tmp_path / "new"), VAVAE(config), image_size=16)
    assert not (tmp_path / "new").exists()
