"""The registry of sizes, its overrides, and what is refused."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from vavae.config import digest
from vavae.errors import UserError
from vavae.models.dit.config import SIZES, LightningDiTConfig, TransformerShape


def test_a_size_gives_the_shape_and_single_keys_override_it():
    assert LightningDiTConfig(size="XL").shape == TransformerShape(28, 1152, 16)
    assert LightningDiTConfig(size="B", depth=3).shape == TransformerShape(3, 768, 12)
    assert LightningDiTConfig(size=None, depth=6, width=192, heads=3).shape == TransformerShape(6, 192, 3)


def test_every_size_is_valid_and_larger_than_the_one_before():
    widths = [LightningDiTConfig(size=size).shape.width for size in SIZES]
    assert widths == sorted(set(widths))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": None, "depth": 6}, "give width, heads as well, or one of S, B, L, XL"),
        ({"size": "B", "heads": 7}, "width=768 must be a multiple of heads=7"),
        ({"size": None, "depth": 1, "width": 30, "heads": 3}, "width=30 must be a multiple of 4"),
        ({"size": None, "depth": 1, "width": 24, "heads": 4}, "24 / heads=4 = 6 must be a multiple of 4 for rope"),
        ({"size": "XXL"}, "Input should be 'S', 'B'"),
    ],
)
def test_impossible_shapes_are_refused_with_value_and_remedy(values, message):
    with pytest.raises(ValidationError, match=message):
        LightningDiTConfig(**values)


def test_without_rope_any_head_will_do():
    assert LightningDiTConfig(size=None, depth=1, width=24, heads=4, rope=False).shape.head_dim == 6


def test_the_number_of_classes_comes_from_the_data_unless_it_is_written():
    assert LightningDiTConfig().with_classes(7).classes == 7
    assert LightningDiTConfig(classes=7).with_classes(7).classes == 7
    with pytest.raises(UserError, match=r"lightningdit.classes=5, but the data has 7"):
        LightningDiTConfig(classes=5).with_classes(7)


def test_checkpointing_activations_is_no_part_of_the_identity():
    plain = digest(LightningDiTConfig())
    assert digest(LightningDiTConfig(checkpoint_activations=True)) == plain
    assert digest(LightningDiTConfig(qk_norm=False)) != plain


def test_configurations_import_without_torch():
    code = "import sys, vavae.models.dit.config, vavae.diffusion.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
