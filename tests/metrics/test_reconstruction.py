import math

import pytest
import torch
from torch import Tensor

from vavae.metrics.reconstruction import psnr, ssim


def constant(*values: int, side: int = 16) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, side, side)


def noise(seed: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, 24, 24), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_psnr_of_constant_differences():
    found = psnr(constant(10, 255, 7), constant(15, 0, 7))
    expected = torch.tensor([20 * math.log10(255 / 5), 0.0, math.inf], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_psnr_counts_dark_to_bright_and_bright_to_dark_alike():
    a, b = noise(0), noise(1)  # unsigned differences must not wrap around
    assert torch.equal(psnr(a, b), psnr(b, a))
    assert (psnr(a, b) < 10).all()


def test_ssim_of_equal_images_is_one():
    torch.testing.assert_close(ssim(noise(0), noise(0)), torch.ones(2))


@pytest.mark.parametrize(("first", "second"), [(60, 90), (125, 129)])
def test_ssim_of_constant_images_is_the_luminance_term_on_minus_one_to_one(first: int, second: int):
    a, b = first / 127.5 - 1, second / 127.5 - 1
    stabiliser = (0.01 * 2) ** 2
    expected = (2 * a * b + stabiliser) / (a * a + b * b + stabiliser)
    assert ssim(constant(first), constant(second)).item() == pytest.approx(expected, abs=1e-3)


def test_ssim_is_per_image():
    a, b = noise(0), noise(1)
    mixed = torch.stack([a[0], b[1]])
    found = ssim(mixed, a)
    assert found[0].item() == pytest.approx(1)
    assert found[1].item() < 0.2


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_other_types_and_shapes_are_refused(measure):
    with pytest.raises(AssertionError, match="whole numbers"):
        measure(noise(0).float(), noise(0).float())
    with pytest.raises(AssertionError, match="do not pair"):
        measure(noise(0), noise(0)[:1])
