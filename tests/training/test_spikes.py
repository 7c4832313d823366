"""Which losses count as spikes."""

import math
import random

import pytest

from vavae.training.spikes import SpikeDetector


def test_mean_and_deviation_are_those_of_the_losses() -> None:
    detector, draw = SpikeDetector(3.0, horizon=500), random.Random(0)
    for _ in range(500):
        detector.is_spike(draw.gauss(5.0, 2.0))
    assert detector.limit() == pytest.approx(5.0 + 3.0 * 2.0, rel=0.1)


def test_nothing_is_a_spike_before_the_horizon() -> None:
    detector = SpikeDetector(1.0, horizon=10)
    assert not any(detector.is_spike(10.0**number) for number in range(10))


def test_a_level_that_stays_ends_being_a_spike() -> None:
    detector, draw = SpikeDetector(6.0, horizon=50), random.Random(0)
    for _ in range(200):
        assert not detector.is_spike(draw.gauss(1.0, 0.1))
    found = [detector.is_spike(draw.gauss(3.0, 0.1)) for _ in range(200)]
    assert found[0]
    assert not any(found[100:])


def test_a_loss_that_is_not_finite_is_one_and_leaves_no_trace() -> None:
    detector = SpikeDetector(6.0, horizon=1)
    detector.is_spike(1.0)
    assert detector.is_spike(math.nan)
    assert detector.limit() == 1.0


def test_without_a_limit_there_are_none() -> None:
    detector = SpikeDetector(None, horizon=1)
    assert not any(detector.is_spike(10.0**number) for number in range(20))
