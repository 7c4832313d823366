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
    return ClassifierFreeGuidance(model, NULL, GuidanceConfig(**config))(X, times(t), LABELS), model.samples


def times(t):
    return torch.tensor(t).expand(2)


def velocity(labels, t=0.5):
    return Model()(X, times(t), labels)


def test_scale_one_is_the_labeled_velocity_for_one_evaluation_each():
    out, samples = guided(scale=1.0, channels=3)
    assert torch.equal(out, velocity(LABELS))
    assert samples == len(X)


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
def test_guidance_is_linear_from_the_null_to_the_labeled_velocity(scale):
    out, samples = guided(scale=scale)
    null = velocity(torch.full_like(LABELS, NULL))
    torch.testing.assert_close(out, null + scale * (velocity(LABELS) - null))
    assert samples == 2 * len(X)


def test_channels_beyond_the_guided_ones_are_the_labeled_velocity():
    some, _ = guided(scale=4.0, channels=3)
    every, _ = guided(scale=4.0)
    assert torch.equal(some[:, :3], every[:, :3])
    assert torch.equal(some[:, 3:], velocity(LABELS)[:, 3:])
    assert not torch.equal(some[:, 3:], every[:, 3:])


@pytest.mark.parametrize(("t", "active"), [(0.0, False), (0.7, True), (0.75, True), (0.8, True), (0.85, False)])
def test_outside_the_closed_interval_no_null_velocity_is_computed(t, active):
    out, samples = guided(t, scale=4.0, interval=(0.7, 0.8))
    assert samples == (2 if active else 1) * len(X)
    assert torch.equal(out, velocity(LABELS, t)) != active


@pytest.mark.parametrize("channels", [None, 3])
def test_each_image_is_guided_by_its_own_time(channels):
    config = {"scale": 4.0, "interval": (0.7, 0.8), "channels": channels}
    together, samples = guided([0.5, 0.75], **config)
    assert samples == 3  # one null velocity, of the image inside the interval
    for image, t in enumerate((0.5, 0.75)):
        assert torch.equal(together[image], guided(t, **config)[0][image])


def test_the_models_output_is_left_as_it_is():
    output = torch.arange(float(2 * X.numel())).view(2 * len(X), *X.shape[1:])
    before = output.clone()
    out = ClassifierFreeGuidance(lambda x, t, y: output, NULL, GuidanceConfig(scale=4.0))(X, times(0.5), LABELS)
    assert torch.equal(output, before)
    torch.testing.assert_close(out, before[2:] + 4 * (before[:2] - before[2:]))


@pytest.mark.parametrize(
    ("config", "jumps"),
    [
        ({"scale": 2, "interval": (0.25, 0.75)}, [0.25, 0.75]),
        ({"scale": 2, "interval": (0, 0.5)}, [0.5]),
        ({"scale": 2, "interval": (0.5, 0.5)}, [0.5]),
        ({"scale": 2}, []),
        ({"scale": 1, "interval": (0.25, 0.75)}, []),
    ],
)
def test_guidance_jumps_at_the_inner_ends_of_its_interval(config, jumps):
    assert ClassifierFreeGuidance(Model(), NULL, GuidanceConfig(**config)).jumps == jumps


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
