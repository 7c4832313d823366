"""Equivariance of decoders: those that have it exactly, and one that has it not by a known amount."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vavae.metrics.equivariance import SquaredErrors, equivariance_errors, squared_errors
from vavae.randomness import torch_generator

sides = st.integers(1, 7)


def noise(*shape, key="noise"):
    return torch.randn(shape, generator=torch_generator(0, key), dtype=torch.float64)


def errors_of(decode, z, images):
    return equivariance_errors(squared_errors(decode, z, images, decode(z)))


@settings(max_examples=20, deadline=None)
@given(sides, sides)
def test_an_identity_is_equivariant_and_its_exact_reconstruction_no_division_by_zero(height, width):
    z = noise(3, 2, height, width)
    assert errors_of(lambda x: x, z, z) == (0, 0)


@settings(max_examples=20, deadline=None)
@given(sides, sides, st.sampled_from([2, 4]))
def test_a_decoder_of_each_position_alone_is_equivariant_to_turns(height, width, factor):
    weight, z = noise(3, 2, 1, 1, key="weight"), noise(3, 2, height, width)

    def decode(x):
        return F.interpolate(F.conv2d(x, weight), scale_factor=float(factor), mode="nearest")

    assert errors_of(decode, z, noise(3, 3, factor * height, factor * width)).quarter_turn == pytest.approx(0, abs=1e-9)


def test_images_that_are_constant_are_resized_to_themselves():
    z = noise(3, 2, 1, 1).expand(3, 2, 6, 4)
    upsample = torch.nn.Upsample(scale_factor=8)
    assert errors_of(upsample, z, noise(3, 2, 48, 32)).half_size == pytest.approx(0, abs=1e-12)


def test_a_decoder_that_knows_places_differs_by_what_it_adds():
    """It adds 1 to the first row: turned, the first row and the last column differ by 1, but not where they meet."""
    z, images = noise(2, 2, 4, 4), noise(2, 2, 4, 4, key="images")

    def decode(x):
        return x + F.one_hot(torch.tensor(0), x.shape[2])[:, None]

    found = squared_errors(decode, z, images, decode(z))
    torch.testing.assert_close(found.quarter_turn, torch.full((2,), 6 / 16).double())
    # Of 2 x 2: the first row has a whole 1 after half of one.
    torch.testing.assert_close(found.half_size, torch.full((2,), 0.5 * 0.25).double())
    torch.testing.assert_close(found.reconstruction, (decode(z) - images).square().mean((1, 2, 3)))
    ratio = (6 / 16) / found.reconstruction.mean().item()
    assert equivariance_errors(found).quarter_turn == pytest.approx(ratio)


@given(st.floats(0.01, 100))
def test_contrast_does_not_matter(scale):
    errors = SquaredErrors(*(noise(5, key=str(place)).square() for place in range(3)))
    scaled = SquaredErrors(*(scale * error for error in errors))
    assert equivariance_errors(scaled) == pytest.approx(equivariance_errors(errors))


def test_where_reconstructions_are_exact_another_error_is_infinite():
    exact = SquaredErrors(torch.zeros(2), torch.ones(2), torch.zeros(2))
    assert equivariance_errors(exact) == (math.inf, 0)
