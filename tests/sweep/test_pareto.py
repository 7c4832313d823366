"""The front and the speed-up against their definitions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vavae.sweep.pareto import pareto_front, speed_up

_VALUES = st.one_of(st.integers(0, 4).map(float), st.just(math.nan))
_POINTS = st.integers(1, 3).flatmap(
    lambda objectives: st.lists(st.lists(_VALUES, min_size=objectives, max_size=objectives), max_size=12)
)


def _beats(one: list[float], other: list[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


@given(_POINTS)
def test_the_front_is_what_brute_force_finds(points: list[list[float]]) -> None:
    known = [point for point in points if not any(map(math.isnan, point))]
    expected = [point in known and not any(_beats(other, point) for other in known) for point in points]
    assert pareto_front(points) == expected


@given(_POINTS)
def test_whoever_is_not_on_the_front_is_beaten_by_someone_on_it(points: list[list[float]]) -> None:
    on = pareto_front(points)
    front = [point for point, is_on in zip(points, on, strict=True) if is_on]
    for point, is_on in zip(points, on, strict=True):
        if not is_on and not any(map(math.isnan, point)):
            assert any(_beats(other, point) for other in front)


@given(st.floats(1.1, 20), st.integers(2, 6))
def test_a_curve_that_is_a_number_of_times_faster_is_found_to_be(ratio: float, rungs: int) -> None:
    images = [int(1e6 * 2**rung) for rung in range(rungs)]
    slow = {seen: 100 - math.log(seen) for seen in images}
    fast = {seen: 100 - math.log(seen * ratio) for seen in images}
    found = speed_up(slow, fast)
    assert found is not None
    if found.at_least:
        assert found.ratio <= ratio * (1 + 1e-9)
        assert ratio >= images[-1] / images[0] * (1 - 1e-9)
    else:
        assert found.ratio == pytest.approx(ratio, rel=1e-6)


def test_a_curve_that_never_arrives_has_no_speed_up() -> None:
    assert speed_up({1: 9.0, 2: 5.0}, {1: 9.0, 2: 6.0}) is None
    slower = speed_up({1: 9.0, 2: 5.0}, {2: 9.0, 8: 1.0})
    assert slower is not None
    assert slower.ratio == pytest.approx(0.5)
