"""A result is a finite number; anything else is refused with what it is of."""

import math

import pytest

from vavae.errors import UserError
from vavae.evaluation.metric import Metric, metrics_json


@pytest.mark.parametrize(("value", "spread"), [(math.nan, None), (math.inf, None), (1.0, math.nan)])
def test_a_metric_that_is_not_finite_is_no_result(value, spread):
    with pytest.raises(UserError, match=rf"^fid is {value:g}.*, which is no result \(custom: 8 samples\): look at"):
        metrics_json([Metric("fid", value, protocol="custom: 8 samples", spread=spread)])


def test_finite_metrics_are():
    assert metrics_json([Metric("fid", 0.0, spread=0.0)])["fid"]["value"] == 0
