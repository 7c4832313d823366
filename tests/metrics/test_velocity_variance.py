"""The irreducible variance of the velocity: covariances that are known, and the integral that it stands for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from vavae.metrics.velocity_variance import kronecker_eigenvalues, velocity_variance
from vavae.randomness import torch_generator

variances = st.lists(st.floats(0.01, 100), min_size=1, max_size=5).map(lambda found: torch.tensor(found).double())


def noise(*shape, key="noise"):
    return torch.randn(shape, generator=torch_generator(0, key), dtype=torch.float64)


def turn(size):
    return torch.linalg.qr(noise(size, size)).Q


def latents_of(channels, positions):
    """Latents [2 · C · S, C, 1, S] whose sample covariance is that of channels times that of positions, both turned.

    Each has one coordinate alone, with either sign, which is as exact as it is unlike a normal distribution.
    """
    deviations = torch.outer(channels.sqrt(), positions.sqrt()).flatten()
    count = 2 * len(deviations)
    single = torch.diag(deviations * math.sqrt((count - 1) / 2))
    x = torch.cat([single, -single]).view(count, len(channels), len(positions))
    return (turn(len(channels)) @ x @ turn(len(positions)))[:, :, None]


@settings(max_examples=40, deadline=None)
@given(variances, variances)
def test_eigenvalues_of_a_product_are_recovered(channels, positions):
    found = kronecker_eigenvalues(latents_of(channels, positions)).sort().values
    torch.testing.assert_close(found, torch.outer(channels, positions).flatten().sort().values, rtol=1e-6, atol=1e-9)


def test_a_covariance_is_recovered_from_draws():
    roots = [noise(size, size, key=f"root {size}") for size in (3, 8)]
    known = torch.outer(*(torch.linalg.eigvalsh(root @ root.T) for root in roots)).flatten().sort().values
    drawn = (roots[0] @ noise(6_000, 3, 8) @ roots[1].T).view(6_000, 3, 2, 4)
    found = kronecker_eigenvalues(drawn).sort().values
    assert ((found - known).abs() / known).max() < 0.06
    assert found.sqrt().sum().item() == pytest.approx(known.sqrt().sum().item(), rel=3e-3)


def test_few_latents_have_the_most_likely_covariance():
    """A loop over latents, until nothing changes; few enough that one whitened by half gives another."""
    latents = (noise(3, 3, key="mix") @ noise(12, 3, 4)) * torch.tensor([0.1, 1, 3, 9]).double()
    centered = [each - latents.mean(0) for each in latents]
    channels, positions = torch.eye(3).double(), torch.eye(4).double()
    for _ in range(200):
        positions = sum(each.T @ channels.inverse() @ each for each in centered) / (12 * 3)
        channels = sum(each @ positions.inverse() @ each.T for each in centered) / (12 * 4)
    expected = torch.linalg.eigvalsh(torch.kron(channels, positions))
    expected *= latents.var(0).sum() / expected.sum()
    found = kronecker_eigenvalues(latents[:, :, None]).sort().values
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("eigenvalue", [0.05, 1.0, 30.0])
def test_it_is_the_integral_over_time_of_the_variance_of_the_velocity_given_the_point(eigenvalue):
    def given_the_point(t):
        """Var(latent - noise | (1 - t) noise + t latent) of Gaussians, by their covariances."""
        variance = (1 - t) ** 2 + t**2 * eigenvalue
        return 1 + eigenvalue - (t * eigenvalue - (1 - t)) ** 2 / variance

    latents = latents_of(torch.tensor([eigenvalue]).double(), torch.ones(4).double())
    assert velocity_variance(latents) == pytest.approx(quad(given_the_point, 0, 1)[0], rel=1e-7)


def test_white_noise_has_half_of_pi_and_few_latents_have_less():
    by_count = [velocity_variance(noise(count, 4, 8, 8)) for count in (3, 10, 50, 500)]
    assert by_count == sorted(by_count)
    assert by_count[-1] == pytest.approx(math.pi / 2, rel=0.01)
    assert by_count[0] < 0.9 * math.pi / 2


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)), st.permutations(range(3)), st.floats(-5, 5), st.floats(0.1, 10))
def test_order_offset_and_turns_do_not_matter_and_scale_does(images, channels, offset, scale):
    latents = noise(6, 3, 2, 5)
    changed = turn(3) @ latents[images][:, channels].flatten(2) @ turn(10) * scale + offset
    assert velocity_variance(changed[:, :, None]) == pytest.approx(velocity_variance(latents) * scale, rel=1e-6)


@pytest.mark.parametrize(("dead", "living"), [((slice(None), 1), 32), ((..., 0, 0), 45), (..., 0)])
def test_what_does_not_vary_adds_nothing(dead, living):
    latents = noise(50, 3, 4, 4)
    latents[dead] = 2.0
    found = kronecker_eigenvalues(latents)
    assert found.isfinite().all()
    assert (found > 1e-9).sum() == living
