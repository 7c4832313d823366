"""Shapes, sizes and dtypes of the autoencoder; its numbers are compared in test_vavae_golden."""

import pytest
import torch
import yaml
from pydantic import ValidationError
from support import small_models

from vavae.config import digest
from vavae.interop.export import DESCRIPTION, WEIGHTS, TokenizerDescription, load_exported_tokenizer, save_export
from vavae.losses.config import VisionFoundationLossConfig
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TeacherConfig, TokenizerConfig
from vavae.randomness import torch_generator


def test_published_parameter_counts():
    with torch.device("meta"):
        vavae = VAVAE(TokenizerConfig())
    millions = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in vavae.named_children()}
    assert round(millions["encoder"], 2) == 28.41
    assert round(millions["decoder"], 2) == 41.42
    assert round(sum(millions.values()), 2) == 69.84


@pytest.mark.parametrize(("multipliers", "size", "grid"), [((1, 2), (8, 12), (4, 6)), ((1, 1, 2, 2), (16, 8), (2, 1))])
def test_the_grid_is_the_image_divided_by_the_downsampling(multipliers, size, grid):
    config = TokenizerConfig(
        latent_dim=5, channels=32, channel_multipliers=multipliers, res_blocks=1, attention_levels=(1,)
    )
    vavae = VAVAE(config)
    posterior = vavae.encode(torch.zeros(2, 3, *size))
    assert posterior.mean.shape == posterior.std.shape == (2, 5, *grid)
    assert tuple(side * config.downsample for side in grid) == size
    assert vavae.decode(posterior.mode).shape == (2, 3, *size)


def test_groups_of_all_norms_are_those_of_the_configuration():
    vavae = VAVAE(TokenizerConfig(channels=48, channel_multipliers=(1, 2), attention_levels=(1,), norm_groups=12))
    groups = {module.num_groups for module in vavae.modules() if isinstance(module, torch.nn.GroupNorm)}
    assert groups == {12}


PARTS = {
    "quant_conv": {"quant_conv.weight", "quant_conv.bias"},
    "post_quant_conv": {"post_quant_conv.weight", "post_quant_conv.bias"},
    "middle_attention": {
        f"{half}.mid.attn_1.{layer}.{kind}"
        for half in ("encoder", "decoder")
        for layer in ("norm", "q", "k", "v", "proj_out")
        for kind in ("weight", "bias")
    },
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_left_out_is_as_if_it_did_nothing(part, storage):
    sizes = {"latent_dim": 4, "channels": 32, "channel_multipliers": (1, 2), "res_blocks": 1, "attention_levels": ()}
    whole = small_models.randomized(VAVAE(TokenizerConfig(**sizes)))
    less = VAVAE(TokenizerConfig(**sizes, **{part: False}))
    state = whole.state_dict()
    assert state.keys() - less.state_dict().keys() == PARTS[part]
    less.load_state_dict({name: tensor for name, tensor in state.items() if name not in PARTS[part]})
    images = torch.rand(2, 3, 8, 8, generator=torch_generator(0, "images"))
    assert not torch.equal(whole.encode(images).mean, less.encode(images).mean) or part == "post_quant_conv"
    for name in PARTS[part]:
        if part == "middle_attention":
            state[name].zero_()
        else:
            state[name].copy_(torch.eye(len(state[name]))[:, :, None, None] if name.endswith("weight") else 0)
    expected, posterior = whole.encode(images), less.encode(images)
    assert torch.equal(posterior.mean, expected.mean)
    assert torch.equal(posterior.logvar, expected.logvar)
    decoded = less.decode(posterior.mode)
    assert torch.equal(decoded, whole.decode(expected.mode))
    (decoded.sum() + less.encode(images).kl().sum()).backward()
    assert all(parameter.grad is not None for parameter in less.parameters())
    assert digest(whole.config) != digest(less.config)
    description = TokenizerDescription(
        tokenizer=less.config, teacher=TeacherConfig(), vision_foundation=VisionFoundationLossConfig(), feature_dim=6
    )
    save_export(storage, description, {WEIGHTS: less.state_dict()})
    assert load_exported_tokenizer(storage)[1] == description
    assert yaml.safe_load(storage.read_bytes(DESCRIPTION))["tokenizer"][part] is False, "which older readers refuse"


def test_half_precision_parameters_keep_float32_moments():
    config = TokenizerConfig(latent_dim=4, channels=32, channel_multipliers=(1,), res_blocks=1, attention_levels=())
    vavae = VAVAE(config).bfloat16()
    posterior = vavae.encode(torch.zeros(1, 3, 8, 8))
    assert posterior.mean.dtype == torch.float32
    assert vavae.decode(posterior.mode).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channels": 48}, "48 is not a multiple of norm_groups 32"),
        ({"channel_multipliers": (1, 2)}, "levels 0 to 1"),
        ({"channel_multipliers": ()}, "one positive number per level"),
        ({"channel_multipliers": (1, 1.3), "attention_levels": ()}, "1.3 times 128 channels is no integer"),
        ({"channel_multipliers": (1, 1.125), "attention_levels": ()}, r"\[128, 144\] channels are not all multiples"),
        ({"latent_dim": 0}, "greater than 0"),
    ],
)
def test_bad_sizes_say_what_is_wrong(values, message):
    with pytest.raises(ValidationError, match=message):
        TokenizerConfig(**values)
