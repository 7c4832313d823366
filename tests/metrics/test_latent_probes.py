"""Probes of latents: fields of known spectrum, rank and structure, and what must not matter."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vavae.metrics.latent_space import (
    effective_rank,
    high_frequency_share,
    local_to_global,
    probe_latents,
    spectrum_slope,
)
from vavae.randomness import torch_generator


def noise(*shape, key="noise"):
    return torch.randn(shape, generator=torch_generator(0, key), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(8, 8), (16, 16), (12, 20)])
@pytest.mark.parametrize("exponent", [-3.0, -1.0, 0.0, 0.5])
def test_a_field_of_known_spectrum_has_its_slope(shape, exponent):
    height, width = shape
    rows, columns = (torch.fft.fftfreq(size, 1 / size) for size in shape)
    radius = torch.hypot(rows[:, None], columns).round().double()
    amplitude = torch.where(radius > 0, radius, 1.0) ** (exponent / 2)
    field = torch.fft.ifft2(amplitude).real  # the spectrum is even, so the field is real
    assert spectrum_slope(field.expand(2, 3, height, width)) == pytest.approx(exponent, abs=1e-6)


def test_white_noise_is_flat_and_blurred_noise_falls():
    white = noise(256, 4, 16, 16)
    blurred = torch.nn.functional.avg_pool2d(white, 3, stride=1, padding=1)
    assert abs(spectrum_slope(white)) < 0.02
    assert spectrum_slope(blurred) < -1


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_as_many_directions_as_are_used_alike(rank):
    axes = torch.eye(6, dtype=torch.float64)[:rank]
    tokens = torch.cat([axes, -axes])  # mean zero, equal variance along each axis
    turn = torch.linalg.qr(noise(6, 6)).Q
    latents = (tokens @ turn).T[None, :, None]  # [1, 6, 1, 2 · rank]
    assert effective_rank(latents) == pytest.approx(rank)


def test_two_directions_of_unequal_variance():
    """Variances 3 and 1: the exponential of the entropy of 3/4 and 1/4."""
    latents = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64).T[None, :, None]
    latents[:, 0] *= math.sqrt(3)
    assert effective_rank(latents) == pytest.approx(0.75**-0.75 * 0.25**-0.25)


def test_halves_that_are_opposite_are_structure_and_noise_is_none():
    """A 4 x 4 grid, left half against right, each pair of places by the definition; near is less than two steps."""
    halves = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    halves[..., 2:] = -1
    places = [*itertools.product(range(4), range(4))]
    pairs = [
        (abs(a - c) + abs(b - d), 1 if (b < 2) == (d < 2) else -1)
        for (a, b), (c, d) in itertools.permutations(places, 2)
    ]
    near = [similarity for distance, similarity in pairs if distance < 2]
    distant = [similarity for distance, similarity in pairs if distance >= 2]
    assert local_to_global(halves) == pytest.approx(sum(near) / len(near) - sum(distant) / len(distant))
    assert abs(local_to_global(noise(200, 8, 4, 4))) < 0.02


def test_white_noise_has_the_share_of_high_frequencies_and_a_constant_none():
    high = sum(u + v > 9 for u, v in itertools.product(range(12), range(8))) / 96  # (12 + 8 - 2) / 2
    assert high_frequency_share(noise(500, 4, 12, 8)) == pytest.approx(high, rel=0.01)
    assert high_frequency_share(torch.full((2, 3, 8, 8), 4.0)) == pytest.approx(0, abs=1e-12)
    assert high_frequency_share(torch.zeros(2, 3, 8, 8)) == 0


@pytest.mark.parametrize(("frequencies", "share"), [((3, 4), 0), ((4, 4), 1), ((7, 7), 1), ((0, 7), 0)])
def test_a_wave_of_the_cosine_transform_is_high_or_not(frequencies, share):
    row, column = (torch.cos(math.pi * (torch.arange(8) + 0.5) * each / 8) for each in frequencies)
    wave = (row[:, None] * column).double().expand(2, 3, 8, 8)
    assert high_frequency_share(wave) == pytest.approx(share, abs=1e-9)


def test_standard_deviations_are_those_of_the_channels():
    latents = noise(50, 3, 4, 4) * torch.tensor([0.1, 1.0, 5.0])[:, None, None] + 7
    found = probe_latents(latents)
    assert found.channel_std_min == pytest.approx(0.1, rel=0.1)
    assert found.channel_std_max == pytest.approx(5, rel=0.1)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(5)), st.permutations(range(3)), st.floats(-50, 50), st.sampled_from([0.01, 3.0]))
def test_neither_order_nor_offset_matters_and_scale_only_where_it_is_measured(images, channels, offset, scale):
    latents = noise(5, 3, 6, 6)
    before, after = probe_latents(latents), probe_latents(latents[images][:, channels] * scale + offset)
    assert after.channel_std_max == pytest.approx(before.channel_std_max * scale)
    same = [name for name in before._fields if not name.startswith("channel_std")]
    assert [getattr(after, name) for name in same] == pytest.approx([getattr(before, name) for name in same], abs=1e-6)


def test_a_dead_channel_shows_and_breaks_nothing():
    latents = noise(10, 3, 4, 4)
    latents[:, 1] = 2.0
    found = probe_latents(latents)
    assert found.channel_std_min == 0
    assert found.effective_rank == pytest.approx(2, abs=0.1)
    assert all(map(math.isfinite, found))


def test_what_cannot_be_told_is_not_a_number():
    latents = noise(2, 2, 4, 4)
    latents[0, 0, 0, 0] = math.inf
    assert all(map(math.isnan, probe_latents(latents)))
    tiny = probe_latents(noise(4, 2, 1, 1))
    assert math.isnan(tiny.spectrum_slope)
    assert math.isnan(tiny.local_to_global)
    assert math.isfinite(tiny.effective_rank)
    assert math.isnan(probe_latents(noise(4, 2, 4, 4), [torch.tensor([2])]).velocity_variance)


def test_the_variance_of_the_velocity_is_a_mean_over_classes():
    """Classes apart from each other: each alone varies less, and where none does there is nothing to predict."""
    latents = noise(60, 2, 4, 4)
    latents[:30] = latents[:1] + 1  # all equal
    classes = [torch.arange(30), torch.arange(30, 60)]
    each = [probe_latents(latents, [found]).velocity_variance for found in classes]
    assert each[0] == pytest.approx(0, abs=1e-6)
    assert probe_latents(latents, classes).velocity_variance == pytest.approx(sum(each) / 2)
    shifted = latents.clone()
    shifted[30:] += 10
    assert probe_latents(shifted, classes).velocity_variance < probe_latents(latents, classes).velocity_variance
