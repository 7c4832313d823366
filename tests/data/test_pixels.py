"""The two ranges of pixels."""

import pytest
import torch

from vavae.data.pixels import to_float, to_uint8


def test_every_value_survives_there_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    floats = to_float(values)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(to_uint8(floats), values)


def test_floats_are_contiguous_however_the_pixels_lie():
    pixels = torch.randint(256, (2, 5, 7, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    assert to_float(pixels).is_contiguous()
    assert torch.equal(to_float(pixels), to_float(pixels.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_beyond_the_range_is_clamped(dtype):
    assert to_uint8(torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0], dtype=dtype)).tolist() == [0, 0, 128, 255, 255]


def test_only_stored_pixels_are_taken():
    with pytest.raises(AssertionError, match="float32"):
        to_float(torch.zeros(1))
