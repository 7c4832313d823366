"""MIND in closed form; the directions are random, so what holds in expectation holds nearly."""

import pytest
import torch
from torch import Tensor

from vavae.metrics.config import MindConfig
from vavae.metrics.mind import mind

DIMENSIONS = 8
CONFIG = MindConfig(directions=4_000, samples=2_000)


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, DIMENSIONS, generator=torch.Generator().manual_seed(seed))


def test_equal_sets_lie_at_zero_in_whatever_order() -> None:
    features = normal(500)
    assert mind(features, features.flip(0), CONFIG, seed=0) == (0.0, 500, 4_000)


def test_a_shift_is_three_times_its_square() -> None:
    shift = torch.arange(DIMENSIONS) / 4
    found = mind(normal(300), normal(300) + shift, CONFIG, seed=0)
    assert found.distance == pytest.approx(3 * shift.square().sum().item(), rel=0.05)


def test_scaled_features_are_known_exactly_through_any_directions() -> None:
    # Projections of 2 x are twice those of x, in the same order: 3 D times the mean square of a projection.
    features = normal(300)
    square = features.double().square().sum(1).mean().item()
    assert mind(2 * features, features, CONFIG, seed=1).distance == pytest.approx(3 * square, rel=0.05)


def test_gaussians_differ_by_the_square_of_their_deviations() -> None:
    found = mind(3 * normal(2_000), normal(2_000, seed=1), CONFIG, seed=0)
    assert found.distance == pytest.approx(3 * DIMENSIONS * (3 - 1) ** 2, rel=0.05)


def test_the_larger_set_gives_its_first_features() -> None:
    small, large = normal(40), normal(90, seed=1)
    found = mind(small, large, CONFIG, seed=0)
    assert found.samples == 40
    assert found == mind(small, large[:40], CONFIG, seed=0)
    assert mind(large, small, MindConfig(directions=5, samples=20), seed=0).samples == 20


def test_directions_are_keyed_by_the_seed_alone() -> None:
    few, state = MindConfig(directions=3), torch.get_rng_state()
    found = [mind(normal(30), normal(30, seed=1), few, seed=seed).distance for seed in (0, 1, 0)]
    assert found[0] == found[2] != found[1]
    assert torch.equal(torch.get_rng_state(), state)
