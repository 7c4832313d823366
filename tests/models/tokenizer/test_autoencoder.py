"""Shapes, sizes and dtypes of the autoencoder; its numbers are compared in test_vavae_golden."""

import pytest
import torch
from pydantic import ValidationError

from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TokenizerConfig


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
        ({"channel_multipliers": ()}, "one positive integer per level"),
        ({"latent_dim": 0}, "greater than 0"),
    ],
)
def test_bad_sizes_say_what_is_wrong(values, message):
    with pytest.raises(ValidationError, match=message):
        TokenizerConfig(**values)
