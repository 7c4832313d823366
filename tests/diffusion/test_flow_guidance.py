"""Guidance: what it computes, where, and how many evaluations it takes."""

import pytest
import torch
from pydantic import ValidationError

from vavae.diffusion.config import GuidanceConfig
from vavae.diffusion.guidance import ClassifierFreeGuidance, drop_labels

NULL = 9
X = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([3, 5])


class Model:
    """A velocity that tells its label and time, and counts the samples it was asked for."""

    def __init__(self):
        self.samples = 0

    def __call__(self, x, t, y):
        self.samples += len(x)
        return x * (1 + y.view(-1, 1, 1, 1)) + t.view(-1, 1, 1, 1)


def guided(t=0.5, **config):
    model = Model()
    return ClassifierFreeGuidance(model, LABELS, NULL, GuidanceConfig(**config))(X, t), model.samples


def velocity(labels, t=0.5):
    return Model()(X, torch.full((2,), t), labels)


def test_scale_one_is_the_labelled_velocity_for_one_evaluation_each():
    out, samples = guided(scale=1.0, channels=3)
    assert torch.equal(out, velocity(LABELS))
    assert samples == len(X)


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
def test_guidance_is_linear_from_the_null_to_the_labelled_velocity(scale):
    out, samples = guided(scale=scale)
    null = velocity(torch.full_like(LABELS, NULL))
    torch.testing.assert_close(out, null + scale * (velocity(LABELS) - null))
    assert samples == 2 * len(X)


def test_channels_beyond_the_guided_ones_are_the_labelled_velocity():
    some, _ = guided(scale=4.0, channels=3)
    every, _ = guided(scale=4.0)
    assert torch.equal(some[:, :3], every[:, :3])
    assert torch.equal(some[:, 3:], velocity(LABELS)[:, 3:])
    assert not torch.equal(some[:, 3:], every[:, 3:])


@pytest.mark.parametrize(("t", "active"), [(0.0, False), (0.7, True), (0.75, True), (0.8, True), (0.85, False)])
def test_outside_the_closed_interval_no_null_velocity_is_computed(t, active):
    t = torch.tensor(t).item()  # as solvers give it, in float32: 0.7 falls below and 0.8 above its decimal
    out, samples = guided(t, scale=4.0, interval=(0.7, 0.8))
    assert samples == (2 if active else 1) * len(X)
    assert torch.equal(out, velocity(LABELS, t)) != active


@pytest.mark.parametrize("interval", [(0.5, 0.4), (-0.1, 1.0), (0.0, 1.1)])
def test_an_interval_out_of_order_is_refused(interval):
    with pytest.raises(ValidationError, match="must satisfy 0 <= low <= high <= 1"):
        GuidanceConfig(interval=interval)


def test_labels_are_dropped_with_the_stated_probability():
    labels = torch.arange(50_000) % NULL
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(drop_labels(labels, NULL, 0.0, generator), labels)
    assert (drop_labels(labels, NULL, 1.0, generator) == NULL).all()
    dropped = drop_labels(labels, NULL, 0.1, generator)
    kept = dropped != NULL
    assert torch.equal(dropped[kept], labels[kept])
    assert 1 - kept.double().mean() == pytest.approx(0.1, abs=5 * 0.3 / len(labels) ** 0.5)
