"""Images until a distance: exact where the distance falls exponentially, as the interpolation takes it to."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vavae.metrics.convergence import Crossing, first_crossing


@given(
    st.floats(0.1, 10),
    st.lists(st.integers(1, 10_000), min_size=2, max_size=20, unique=True),
    st.floats(0.01, 0.99),
)
def test_an_exponential_fall_is_met_exactly(rate: float, images: list[int], share: float) -> None:
    seen = sorted(images)
    expected = seen[0] + share * (seen[-1] - seen[0])
    falling = {count: 500 * math.exp(-rate * count / 10_000) for count in images}
    found = first_crossing(falling, 500 * math.exp(-rate * expected / 10_000))
    assert found is not None
    assert found.images == pytest.approx(expected, rel=1e-6)
    assert found.after is not None
    assert found.after <= found.images * (1 + 1e-9)
    assert found.images <= found.until * (1 + 1e-9)


def test_the_first_fall_counts_whatever_comes_after() -> None:
    distances = {400: 10.0, 100: 100.0, 200: 40.0, 300: 90.0}
    assert first_crossing(distances, 50.0) == Crossing(
        pytest.approx(100 + 100 * math.log(2) / math.log(2.5)), after=100, until=200
    )
    assert first_crossing(distances, 40.0) == Crossing(pytest.approx(200.0), 100, 200), "falls to it, not below"


def test_a_distance_that_begins_below_is_a_bound() -> None:
    found = first_crossing({100: 30.0, 200: 20.0}, 50.0)
    assert found == Crossing(100.0, None, 100)
    assert found.in_words == "at most: reached at the first measurement, after 100 images"


def test_what_is_not_reached_has_no_number() -> None:
    assert first_crossing({100: 60.0, 200: 51.0}, 50.0) is None
    assert first_crossing({}, 50.0) is None


def test_zero_has_no_logarithm() -> None:
    assert first_crossing({100: 60.0, 200: 0.0}, 50.0) == Crossing(200.0, 100, 200)
