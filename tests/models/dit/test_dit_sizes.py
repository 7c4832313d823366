"""How many parameters each size has, on the meta device: the published figures, and a count by hand."""

import pytest
import torch

from vavae.models.dit.config import SIZES, LightningDiTConfig
from vavae.models.dit.model import LightningDiT

CLASSES, LATENT_DIM, GRID = 1000, 32, 16
PUBLISHED = {"B": "130.56", "L": "458.15", "XL": "675.26", "1p0B": "1029.40", "1p6B": "1631.77"}
"""Millions at patch 1, with the released switches; there is no S in the public registry."""


def parameters(size, patch):
    """As the public code counts: with the position embedding, which is a frozen parameter there."""
    with torch.device("meta"):
        config = LightningDiTConfig(size=size, patch_size=patch, classes=CLASSES, qk_norm=False)
        model = LightningDiT(config, LATENT_DIM, GRID)
    return sum(parameter.numel() for parameter in model.parameters()) + model.pos_embed.numel()


def linear(inputs, outputs):
    return (inputs + 1) * outputs


def counted_by_hand(depth, width, patch):
    values, tokens = LATENT_DIM * patch**2, (GRID // patch) ** 2
    hidden = int(2 / 3 * 4 * width)
    feed_forward = linear(width, 2 * hidden) + linear(hidden, width)
    block = 2 * width + linear(width, 3 * width) + linear(width, width) + feed_forward + linear(width, 6 * width)
    embedders = linear(values, width) + linear(256, width) + linear(width, width) + (CLASSES + 1) * width
    output = width + linear(width, values) + linear(width, 2 * width)
    return embedders + tokens * width + depth * block + output


@pytest.mark.parametrize(("size", "millions"), PUBLISHED.items())
def test_parameters_are_the_published_number_to_its_last_digit(size, millions):
    assert f"{parameters(size, 1) / 1e6:.2f}" == millions


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_each_size_and_patch_are_those_counted_by_hand(size, patch):
    shape = SIZES[size]
    assert parameters(size, patch) == counted_by_hand(shape.depth, shape.width, patch)
