"""Guidance: what it computes, where, and how many evaluations it takes."""

import pytest
import torch
from pydantic import ValidationError

from vavae.diffusion.config import GuidanceConfig, WeakModelConfig
from vavae.diffusion.guidance import Autoguidance, ClassifierFreeGuidance, drop_labels, guide

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


def weak_velocity(x, t, y):
    return 3 * x - t.view(-1, 1, 1, 1)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.5])
def test_a_weak_model_is_left_behind_by_the_scale_within_the_interval_alone(scale):
    evaluated = []

    def weak(x, t, y):
        evaluated.append(len(x))
        return weak_velocity(x, t, y)

    config, t = WeakModelConfig(model="runs/weak", scale=scale, interval=(0.25, 0.75)), torch.tensor([0.1, 0.25])
    out = Autoguidance(Model(), weak, config)(X, t, LABELS)
    alone, v_weak = Model()(X, t, LABELS), weak_velocity(X, t, LABELS)
    assert out[0].equal(alone[0])
    assert sum(evaluated) == (scale != 1), "one image lies in the interval"
    torch.testing.assert_close(out[1], v_weak[1] + scale * (alone[1] - v_weak[1]))


def test_all_guidance_together_goes_from_the_inside_out():
    weak = WeakModelConfig(model="runs/weak", scale=2, interval=(0.2, 1))
    config = GuidanceConfig(scale=1.5, internal_scale=1.4, internal_interval=(0, 0.9), weak=weak)

    def predict(x, t, y):
        return Model()(x, t, y), -x

    velocity = guide(predict, NULL, config, weak_velocity)
    assert velocity.jumps == torch.tensor([0.2, 0.9]).tolist()

    def of_label(y):
        inner = predict(X, times(0.5), y)[0]
        inner = inner + 0.4 * (inner + X)
        v_weak = weak_velocity(X, times(0.5), y)
        return v_weak + 2 * (inner - v_weak)

    null = of_label(torch.full_like(LABELS, NULL))
    torch.testing.assert_close(velocity(X, times(0.5), LABELS), null + 1.5 * (of_label(LABELS) - null))
    assert config.summary == (
        "guidance 1.5 for t in [0, 1], internal guidance 1.4 for t in [0, 0.9], "
        "autoguidance 2 by weak for t in [0.2, 1]"
    )
