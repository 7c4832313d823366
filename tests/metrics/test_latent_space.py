"""Table 6's measures: closed forms, properties, and an independent estimate of the density."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vavae.metrics.latent_space import FEWEST_TOKENS, density_uniformity, kernel_densities, map_latents
from vavae.randomness import numpy_generator

DENSITIES = arrays(np.float64, st.integers(2, 40), elements=st.floats(1e-3, 1e3))


@pytest.mark.parametrize("count", [2, 100])
def test_equal_densities_are_even(count):
    found = density_uniformity(np.full(count, 0.3))
    assert found == pytest.approx((0, 0, 1), abs=1e-8)


@pytest.mark.parametrize("count", [2, 100])
def test_one_that_has_everything_is_the_other_extreme(count):
    densities = np.zeros(count)
    densities[1] = 7
    assert density_uniformity(densities) == pytest.approx((math.sqrt(count - 1), (count - 1) / count, 0), abs=1e-7)


def test_two_densities_by_hand():
    """Shares of a quarter and three: deviation 1/4 of mean 1/2; Gini 1/4; entropy in bits."""
    entropy = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert density_uniformity(np.array([3.0, 1.0])) == pytest.approx((0.5, 0.25, entropy), abs=1e-8)


@given(DENSITIES)
def test_gini_is_half_the_mean_difference_of_all_pairs(densities):
    differences = np.abs(densities[:, None] - densities)
    assert density_uniformity(densities).gini == pytest.approx(differences.mean() / (2 * densities.mean()), abs=1e-9)


@given(DENSITIES, st.floats(1e-3, 1e3), st.randoms())
def test_neither_scale_nor_order_matters_and_bounds_hold(densities, scale, random):
    found = density_uniformity(densities)
    shuffled = densities[random.sample(range(len(densities)), len(densities))]
    assert density_uniformity(shuffled * scale) == pytest.approx(found, abs=1e-9)
    assert 0 <= found.cv <= math.sqrt(len(densities) - 1) + 1e-9
    assert -1e-12 <= found.gini < 1
    assert 0 <= found.entropy <= 1 + 1e-12


def test_densities_are_sums_of_gaussians_of_scotts_width():
    points = numpy_generator(0, "points").normal(size=(50, 2)) @ np.array([[1.0, 0.4], [0.0, 2.0]])
    width = np.cov(points.T) * len(points) ** (-1 / 3)  # Scott: n^(-1 / (d + 4)), squared
    offsets = points[:, None] - points
    kernels = np.exp(-0.5 * np.einsum("ijk,kl,ijl->ij", offsets, np.linalg.inv(width), offsets))
    expected = kernels.mean(1) / (2 * np.pi * math.sqrt(np.linalg.det(width)))
    np.testing.assert_allclose(kernel_densities(points), expected)


def test_an_even_grid_is_more_even_than_a_cluster_with_stragglers():
    grid = np.stack(np.meshgrid(np.arange(20.0), np.arange(20.0)), -1).reshape(-1, 2)
    random = numpy_generator(0, "cluster")
    cluster = np.where(np.arange(400)[:, None] < 300, random.normal(size=(400, 2)), 10 * random.normal(size=(400, 2)))
    even, uneven = (density_uniformity(kernel_densities(points)) for points in (grid, cluster))
    assert even.cv < 0.3 < 0.5 < uneven.cv
    assert even.gini < uneven.gini
    assert even.entropy > uneven.entropy


def test_a_map_of_two_far_clusters_keeps_them_apart_and_is_the_same_again():
    random = numpy_generator(0, "tokens")
    half = FEWEST_TOKENS // 2 + 1
    tokens = np.concatenate([random.normal(size=(half, 4)), random.normal(size=(half, 4)) + 30]).astype(np.float32)
    found, again = map_latents(tokens), map_latents(tokens)
    np.testing.assert_array_equal(found.points, again.points)
    assert found.densities.shape == (2 * half,)
    distances = np.linalg.norm(found.points[:, None] - found.points, axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (distances.argmin(1) < half).tolist() == [True] * half + [False] * half
