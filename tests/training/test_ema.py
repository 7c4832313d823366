"""The average of the weights: its closed form, in fp32, and what is stored of it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from vavae.distributed.config import EngineConfig, OptimizerConfig
from vavae.distributed.engine import TorchEngine
from vavae.distributed.shard_files import load_tensor_shards, save_tensor_shards
from vavae.distributed.world import World
from vavae.training.ema import ExponentialMovingAverage


def average_of(module: nn.Module, decay: float) -> ExponentialMovingAverage:
    return ExponentialMovingAverage(TorchEngine(module, OptimizerConfig(), EngineConfig(), World(), 1), decay, World())


def test_it_is_the_weighted_sum_of_all_weights():
    module, decay = nn.Linear(1, 1, bias=False).double(), 0.9
    values = [3.0, -1.0, 4.0, 1.0, -5.0]
    module.weight.data.fill_(values[0])
    average = average_of(module, decay)
    for value in values[1:]:
        module.weight.data.fill_(value)
        average.update()
    steps = len(values) - 1
    expected = decay**steps * values[0] + sum(
        (1 - decay) * decay ** (steps - i) * values[i] for i in range(1, steps + 1)
    )
    assert average.weights()["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert module.weight.item() == values[-1], "the weights themselves are left alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_average_is_kept_in_fp32_whatever_the_weights(dtype):
    module = nn.Linear(1, 1, bias=False).to(dtype)
    module.weight.data.fill_(1.0)
    average = average_of(module, 0.9999)
    module.weight.data.fill_(2.0)
    for _ in range(100):
        average.update()
    weight = average.weights()["weight"]
    assert weight.dtype == torch.float32
    assert weight.item() == pytest.approx(2 - 0.9999**100, rel=1e-5)


def test_buffers_are_averaged_and_counters_are_as_they_are():
    module = nn.BatchNorm1d(2)
    average = average_of(module, 0.5)
    module.running_mean.fill_(1.0)
    module.num_batches_tracked.fill_(7)
    average.update()
    weights = average.weights()
    assert weights.keys() == module.state_dict().keys()
    assert weights["running_mean"].tolist() == [0.5, 0.5]
    assert weights["num_batches_tracked"].item() == 7


def test_a_saved_average_continues(tmp_path: Path):
    module = nn.Linear(2, 2)
    average, other = (average_of(module, 0.5) for _ in range(2))
    module.weight.data.add_(1)
    average.update()
    save_tensor_shards(average.tensor_shards, tmp_path / "0")
    load_tensor_shards(other.tensor_shards, [tmp_path / "0"])
    for each in (average, other):
        each.update()
    whole, loaded = average.weights(), other.weights()
    assert all(torch.equal(whole[name], loaded[name]) for name in whole)
    assert not torch.equal(whole["weight"], module.weight), "a copy is averaged"


@pytest.mark.parametrize("other", [nn.Linear(2, 2, bias=False), nn.Linear(3, 2), nn.Linear(2, 1), nn.BatchNorm1d(2)])
def test_the_average_of_another_module_is_refused(tmp_path: Path, other: nn.Module):
    save_tensor_shards(average_of(other, 0.5).tensor_shards, tmp_path / "0")
    with pytest.raises(AssertionError, match="of another module"):
        load_tensor_shards(average_of(nn.Linear(2, 2), 0.5).tensor_shards, [tmp_path / "0"])
