"""A result is a finite number; anything else is refused with what it is of."""

import math

import pytest
import torch

from vavae.config.load import load
from vavae.errors import UserError
from vavae.evaluation.generation import ClassifierVerdict, Reference
from vavae.evaluation.metric import Metric, metrics_json
from vavae.evaluation.metrics import classifier_metrics, generation_metrics, reconstruction_metrics
from vavae.evaluation.reconstruction import Reconstruction
from vavae.metrics.features import FeatureSummary
from vavae.metrics.frechet import FeatureStatistics
from vavae.runs.config import RunConfig


@pytest.mark.parametrize(("value", "spread"), [(math.nan, None), (math.inf, None), (1.0, math.nan)])
def test_a_metric_that_is_not_finite_is_no_result(value, spread):
    with pytest.raises(UserError, match=rf"^fid is {value:g}.*, which is no result \(custom: 8 samples\): look at"):
        metrics_json([Metric("fid", value, protocol="custom: 8 samples", spread=spread)])


def test_finite_metrics_are():
    assert metrics_json([Metric("fid", 0.0, spread=0.0)])["fid"]["value"] == 0


def protocols(form, classes=0):
    """Protocols by the names of metrics, of images of a form."""
    config = load(RunConfig, "tiny", [f"shards.{name}={value}" for name, value in form.items()])
    found = {"psnr": 9.0, "ssim": 0.5, "lpips": 0.5, "alignment": 0.5}
    tensor = torch.zeros(0)
    metrics = reconstruction_metrics(Reconstruction(8, 0, found, {"efficientnet_lite0": 1.0}, (tensor, tensor)), config)
    features = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    sums = features.double()
    summary = FeatureSummary(FeatureStatistics(8, sums.sum(0), sums.T @ sums), None, (), features)
    summaries = {"efficientnet_lite0": summary}
    references = {"efficientnet_lite0": Reference.of(summary, "held-out images")}
    metrics += generation_metrics(summaries, references, classes, config, torch.device("cpu"))
    metrics += classifier_metrics(ClassifierVerdict(0.5, 0.5, 0.5, held_out=8, fitted=8), 8, 8, classes, config)
    return {metric.name: metric.protocol for metric in metrics}


@pytest.mark.parametrize(
    ("form", "own", "seen", "rounded"),
    [
        ({"channels": 1}, "gray of 8 bits", "gray seen three times", ""),
        ({"channels": 1, "depth": 16}, "gray of 16 bits", "gray seen three times", ", 16 bits rounded to 8"),
        ({"channels": 4}, "color and opacity of 8 bits", "color seen over mid-gray where it is not opaque", ""),
    ],
)
def test_protocols_say_how_images_that_are_no_color_of_8_bits_are_seen(form, own, seen, rounded):
    plain, other = protocols({}), protocols(form)
    for name in plain:
        expected = own if name in ("psnr", "ssim") else seen
        in_floats = name in ("psnr", "ssim", "lpips", "alignment_cosine")
        assert f"; {expected}{'' if in_floats else rounded}" in other[name]
        assert not any(word in plain[name] for word in ("gray", "opacity", "bits"))


def test_protocols_say_whether_there_are_classes():
    assert protocols({})["generation_frechet_distance"].startswith("custom: 8 samples, euler 4 steps")
    assert "custom: 8 class-balanced samples (2 or 3 of a class), euler" in protocols({}, 3)["class_agreement"]
    assert "custom: 8 samples, one of each of the first 8 of 9 classes" in protocols({}, 9)["within_class_variety"]
