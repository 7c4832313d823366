"""Rank correlations of cheap probes with generation: closed form, what must not matter, and when there is none."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vavae.sweep.trial_results import RankCorrelation, SeedMean, TrialResult, rank_correlations

DISTANCE = "generation_frechet_distance"


def trials(*columns, state="finished", names=("psnr", DISTANCE)):
    """A trial for each place of the columns, which hold one metric each."""
    return [
        TrialResult(
            str(place), {}, state, "",
            {128: {DISTANCE: SeedMean(float(place), None)}, 256: dict(zip(names, map(seeds, row), strict=True))},
        )
        for place, row in enumerate(zip(*columns, strict=True))
    ]  # fmt: skip


def seeds(value):
    return value if isinstance(value, SeedMean) else SeedMean(value, None)


@given(st.integers(4, 12).flatmap(lambda count: st.permutations(range(count))))
def test_ranks_without_ties_have_the_closed_form(order):
    count = len(order)
    (found,) = rank_correlations(trials([math.exp(each) for each in order], range(count)))
    squares = sum((place - each) ** 2 for place, each in enumerate(order))
    assert found.value == pytest.approx(1 - 6 * squares / (count * (count**2 - 1)))
    assert found == ("psnr", DISTANCE, count, found.value)


def test_a_mean_over_seeds_counts_once_and_unfinished_trials_do_not():
    means = [SeedMean.of([value - 5, value + 5]) for value in (1.0, 2.0, 3.0, 4.0)]
    stopped = trials([0.0] * 9, [1.0] * 9, state="stopped")
    assert rank_correlations(trials(means, [8.0, 6.0, 4.0, 2.0]) + stopped) == [
        RankCorrelation("psnr", DISTANCE, 4, pytest.approx(-1))
    ]


@pytest.mark.parametrize(
    ("probe", "distance"), [([1, 2, 3], [1, 2, 3]), ([5, 5, 5, 5], [1, 2, 3, 4]), ([1, 2, 3, 4], [7, 7, 7, 7])]
)
def test_too_few_and_equal_ones_have_none(probe, distance):
    assert rank_correlations(trials(probe, distance)) == [("psnr", DISTANCE, len(probe), None)]


def test_every_probe_meets_every_judge_and_what_needs_a_diffusion_model_is_no_probe():
    judge = f"{DISTANCE}_efficientnet_lite2"
    names = ("latent_velocity_variance", "density_cv", "reconstruction_frechet_distance_inception", "class_agreement")
    found = rank_correlations(trials(*[range(4)] * 6, names=(*names, DISTANCE, judge)))
    assert [one[:2] for one in found] == [(name, distance) for name in names[:3] for distance in (DISTANCE, judge)]
    assert all(one.value == pytest.approx(1) for one in found)


def test_a_probe_that_some_trials_lack_is_of_the_others():
    lacking = trials([9.0], names=(DISTANCE,))
    assert rank_correlations(trials(range(4), range(4)) + lacking)[0].trials == 4
    assert rank_correlations(lacking) == []
