"""The two ranges of pixels."""

import pytest
import torch

from vavae.data.pixels import to_float, to_pixels, to_rgb


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_every_value_survives_there_and_back(dtype):
    values = torch.arange(torch.iinfo(dtype).max + 1).to(dtype)
    floats = to_float(values)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(to_pixels(floats, dtype), values)


def test_other_formats_are_seen_in_color():
    gray = torch.tensor([[0, 128, 255]], dtype=torch.uint8).view(1, 1, 1, 3)
    assert torch.equal(to_rgb(gray), gray.expand(1, 3, 1, 3))
    deep = (gray.int() * 257 + torch.tensor([100, -100, -100])).to(torch.uint16)
    assert torch.equal(to_rgb(deep), gray.expand(1, 3, 1, 3)), "rounded to the nearest of 8 bits"
    clear = torch.tensor([[200, 10, 0, 0], [200, 10, 0, 255]], dtype=torch.uint8).T.reshape(1, 4, 1, 2)
    assert to_rgb(clear)[0, :, 0].T.tolist() == [[128, 128, 128], [200, 10, 0]], "mid-gray behind what is clear"
    half = torch.tensor([255, 255, 0, 51], dtype=torch.uint8).view(1, 4, 1, 1)
    assert to_rgb(half).flatten().tolist() == [153, 153, 102], "a fifth of the color, four of mid-gray"
    color = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    assert to_rgb(color) is color


def test_floats_are_contiguous_however_the_pixels_lie():
    pixels = torch.randint(256, (2, 5, 7, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    assert to_float(pixels).is_contiguous()
    assert torch.equal(to_float(pixels), to_float(pixels.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_beyond_the_range_is_clamped(dtype):
    assert to_pixels(torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0], dtype=dtype)).tolist() == [0, 0, 128, 255, 255]


def test_only_stored_pixels_are_taken():
    with pytest.raises(AssertionError, match="float32"):
        to_float(torch.zeros(1))
