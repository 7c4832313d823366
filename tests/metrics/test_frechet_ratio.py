"""Fréchet distances in units of those of real images."""

import itertools

import pytest
import torch

from vavae.errors import UserError
from vavae.metrics.config import PUBLISHED_DIVISORS
from vavae.metrics.frechet import FeatureStatistics, frechet_distance
from vavae.metrics.frechet_ratio import frechet_ratios


def statistics(shift: float, seed: int = 0) -> FeatureStatistics:
    found = FeatureStatistics.empty(4)
    found.update(torch.randn(50, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift)
    return found


def test_images_equal_to_the_real_ones_have_the_ratio_one() -> None:
    reference, real = statistics(0.0), statistics(0.5, seed=1)
    distance = frechet_distance(real, reference)
    found = frechet_ratios({"a": distance, "b": 3.0}, {"a": distance, "b": 3.0})
    assert found == ({"a": 1.0, "b": 1.0}, 1.0)


def test_a_shift_twice_as_far_has_four_times_the_distance() -> None:
    reference = statistics(0.0)
    distances = {shift: frechet_distance(statistics(shift), reference) for shift in (0.5, 1.0)}
    found = frechet_ratios({"a": distances[1.0], "b": distances[0.5]}, dict.fromkeys("ab", distances[0.5]))
    assert found.ratios == {"a": pytest.approx(4, rel=1e-9), "b": 1.0}
    assert found.mean == pytest.approx(2.5, rel=1e-9)


def test_the_order_of_the_networks_changes_no_bit() -> None:
    distances = {"a": 1e16, "b": 1.0, "c": 1.0, "d": 1.0}  # one at a time, each of the small ones would be lost
    divisors = dict.fromkeys(distances, 1.0)
    means = {
        frechet_ratios({name: distances[name] for name in order}, divisors).mean
        for order in itertools.permutations(distances)
    }
    assert len(means) == 1


def test_published_divisors_give_one_for_themselves() -> None:
    published = {"inception": 1.68, "convnextv2_base": 56.87, "dinov2_large_256": 14.19}
    assert {**published, "mae_large": 0.04, "siglip2_so400m": 0.60, "clip_large": 5.60} == PUBLISHED_DIVISORS
    assert frechet_ratios(PUBLISHED_DIVISORS, PUBLISHED_DIVISORS).mean == 1


def test_nothing_is_divided_by_zero() -> None:
    with pytest.raises(UserError, match="at a distance of 0 from the reference through b, which cannot divide"):
        frechet_ratios({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.0})
