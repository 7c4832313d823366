"""Values that are not finite are named, and never written as numbers."""

import math

import pytest
import torch

from vavae.errors import UserError
from vavae.finite import finite_row, require_finite, require_finite_images

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("value", "word"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_a_value_is_named_with_its_place(dtype, value, word):
    tensor = torch.ones(2, 3).to(torch.float32)
    tensor[1, 0] = value
    with pytest.raises(UserError, match=rf"^w.pt: a\[1, 0\] is {word}: fetch it again$"):
        require_finite({"b": torch.ones(1), "a": tensor.to(dtype)}, "w.pt", "fetch it again")


def test_of_many_the_first_is_named_with_their_number():
    with pytest.raises(UserError, match=r"p: a\[2\] is nan \(the first of 2 values that are not finite\): r$"):
        require_finite({"a": torch.tensor([0, 0, math.nan, math.inf])}, "p", "r")
    with pytest.raises(UserError, match=r"p: a is nan: r$"):
        require_finite({"a": torch.tensor(math.nan)}, "p", "r")


@pytest.mark.parametrize("dtype", [*TYPES, torch.int64, torch.bool])
def test_finite_values_pass_even_where_their_sum_overflows(dtype):
    largest = torch.finfo(dtype).max if dtype.is_floating_point else 1
    require_finite({"a": torch.full((9,), largest, dtype=torch.float64).to(dtype), "b": torch.ones(0)}, "p", "r")


def test_an_image_is_named_by_its_index():
    require_finite_images(torch.ones(3, dtype=torch.bool), "sample", 40, "no")
    with pytest.raises(UserError, match=r"^sample 41 \(the first of 2 such\): no$"):
        require_finite_images(torch.tensor([True, False, False]), "sample", 40, "no")


def test_a_row_has_none_where_a_figure_is_not_finite():
    row = {"stage": "s", "images": 3, "a": 0.5, "b": math.nan, "c": -math.inf}
    assert finite_row(row) == {"stage": "s", "images": 3, "a": 0.5, "b": None, "c": None}
