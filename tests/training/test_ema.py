"""The average of the weights: its closed form, in fp32."""

import pytest
import torch
from torch import nn

from vavae.training.ema import ExponentialMovingAverage


def test_it_is_the_weighted_sum_of_all_weights():
    module, decay = nn.Linear(1, 1, bias=False).double(), 0.9
    values = [3.0, -1.0, 4.0, 1.0, -5.0]
    module.weight.data.fill_(values[0])
    average = ExponentialMovingAverage(module, decay)
    for value in values[1:]:
        module.weight.data.fill_(value)
        average.update()
    steps = len(values) - 1
    expected = decay**steps * values[0] + sum(
        (1 - decay) * decay ** (steps - i) * values[i] for i in range(1, steps + 1)
    )
    assert average.shadow["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert module.weight.item() == values[-1], "the weights themselves are left alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_average_is_kept_in_fp32_whatever_the_weights(dtype):
    module = nn.Linear(1, 1, bias=False).to(dtype)
    module.weight.data.fill_(1.0)
    average = ExponentialMovingAverage(module, 0.9999)
    module.weight.data.fill_(2.0)
    for _ in range(100):
        average.update()
    assert average.shadow["weight"].dtype == torch.float32
    assert average.shadow["weight"].item() == pytest.approx(2 - 0.9999**100, rel=1e-5)


def test_buffers_are_averaged_and_counters_left_out():
    module = nn.BatchNorm1d(2)
    average = ExponentialMovingAverage(module, 0.5)
    assert set(average.shadow) == {"weight", "bias", "running_mean", "running_var"}
    module.running_mean.fill_(1.0)
    average.update()
    assert average.shadow["running_mean"].tolist() == [0.5, 0.5]


def test_a_saved_average_goes_on_where_it_was():
    module = nn.Linear(2, 2)
    average, other = (ExponentialMovingAverage(module, 0.5) for _ in range(2))
    module.weight.data.add_(1)
    average.update()
    saved = {name: tensor.clone() for name, tensor in average.shadow.items()}
    other.load(saved)
    for each in (average, other):
        each.update()
    assert all(torch.equal(average.shadow[name], other.shadow[name]) for name in saved)
    assert not torch.equal(saved["weight"], other.shadow["weight"]), "a copy was loaded"


@pytest.mark.parametrize(
    "change", [lambda shadow: shadow.pop("bias"), lambda shadow: shadow.update(more=torch.ones(1))]
)
def test_the_average_of_another_module_is_refused(change):
    average = ExponentialMovingAverage(nn.Linear(2, 2), 0.5)
    shadow = dict(average.shadow)
    change(shadow)
    with pytest.raises(AssertionError, match="another module"):
        average.load(shadow)
