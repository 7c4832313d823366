"""The learning rate is a closed form of images seen."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vavae.runs.training_config import ScheduleConfig
from vavae.training.trainer import learning_rate

PEAK = 2e-4
schedules = st.tuples(st.integers(0, 10_000), st.integers(1, 10_000)).map(
    lambda lengths: ScheduleConfig(warmup_images=lengths[0], decay_images=sum(lengths))
)


def test_without_lengths_it_is_constant():
    assert {learning_rate(PEAK, ScheduleConfig(), images) for images in (0, 1, 10**9)} == {PEAK}


@pytest.mark.parametrize(("images", "share"), [(0, 1 / 100), (49, 1 / 2), (98, 99 / 100), (99, 1), (10**9, 1)])
def test_the_rise_is_linear_and_never_zero(images, share):
    assert learning_rate(PEAK, ScheduleConfig(warmup_images=99), images) == pytest.approx(PEAK * share)


@pytest.mark.parametrize(
    ("images", "share"),
    [(100, 1), (150, 0.5 + math.sqrt(0.125)), (200, 0.5), (250, 0.5 - math.sqrt(0.125)), (300, 0), (10**9, 0)],
)
def test_the_fall_is_half_a_cosine(images, share):
    schedule = ScheduleConfig(warmup_images=100, decay_images=300)
    assert learning_rate(PEAK, schedule, images) == pytest.approx(PEAK * share, abs=1e-18)


@pytest.mark.parametrize(("images", "share"), [(99, 1), (300, 1), (400, 0.7), (500, 0.4), (600, 0.1), (10**9, 0.1)])
def test_a_line_falls_between_two_points(images, share):
    schedule = ScheduleConfig(
        warmup_images=99, decay="linear", decay_from_images=300, decay_images=600, final_factor=0.1
    )
    assert learning_rate(PEAK, schedule, images) == pytest.approx(PEAK * share)


@pytest.mark.parametrize(("images", "share"), [(200, 1), (250, 0.55 + 0.45 * math.sqrt(0.5)), (300, 0.55), (400, 0.1)])
def test_half_a_cosine_may_begin_later_and_end_higher(images, share):
    schedule = ScheduleConfig(warmup_images=100, decay_from_images=200, decay_images=400, final_factor=0.1)
    assert learning_rate(PEAK, schedule, images) == pytest.approx(PEAK * share)


@settings(deadline=None)
@given(schedules, st.integers(0, 30_000))
def test_what_was_there_before_a_decay_could_be_chosen_has_the_same_bits(schedule, images):
    if schedule.warmup_images <= images < schedule.decay_images:
        progress = (images - schedule.warmup_images) / (schedule.decay_images - schedule.warmup_images)
        assert learning_rate(PEAK, schedule, images) == PEAK * 0.5 * (1 + math.cos(math.pi * progress))


@settings(deadline=None)
@given(schedules, st.integers(0, 30_000), st.integers(1, 1000))
def test_it_rises_then_falls_between_zero_and_the_peak(schedule, images, more):
    now, later = (learning_rate(PEAK, schedule, at) for at in (images, images + more))
    assert 0 <= now <= PEAK
    if images + more < schedule.warmup_images:
        assert now < later
    elif images >= schedule.warmup_images:
        assert now >= later
