"""The average of the weights: its closed form, in fp32, and what is stored of it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.toy_training import ToyStep, train_toy
from support.trained_run import trained_run
from torch import nn

from vavae.config import load
from vavae.distributed.config import EngineConfig, OptimizerConfig
from vavae.distributed.engine import TorchEngine
from vavae.distributed.shard_files import load_tensor_shards, save_tensor_shards
from vavae.distributed.world import World
from vavae.runs.config import RunConfig
from vavae.runs.run import Run
from vavae.runs.training_config import LightningDiTTrainingConfig, TrainingConfig
from vavae.runs.training_inputs import LightningDiTTrainingInputs
from vavae.storage.storage import Storage
from vavae.training import train as train_module
from vavae.training.ema import ExponentialMovingAverage, initial_share, initial_share_warning, ramp_limit
from vavae.training.session import LocalSession


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


def training_of(**fields: Any) -> TrainingConfig:
    return TrainingConfig(batch_size=64, **fields)


def test_a_ramp_limits_the_half_life_to_a_share_of_the_images_seen() -> None:
    training = training_of(images=1, ema_decay=0.9999, ema_ramp=0.09)
    for images in (64, 6400, 64_000):
        steps = 0.09 * images / 64
        assert ramp_limit(training, images) ** steps == pytest.approx(0.5)
    half_life = -64 * math.log(2) / math.log(0.9999)
    assert ramp_limit(training, round(half_life / 0.09)) == pytest.approx(0.9999, rel=1e-9)
    assert ramp_limit(training_of(images=1, ema_decay=0.9999), 64) == 1.0, "neutral"


@pytest.mark.parametrize("ramp", [None, 0.09, 2.0])
def test_an_average_with_a_ramp_is_the_weighted_sum_of_all_weights(ramp: float | None) -> None:
    module, decay, values = nn.Linear(1, 1, bias=False), 0.8, [3.0, -1.0, 4.0, 1.0, -5.0, 9.0]
    training = training_of(images=5 * 64, ema_decay=decay, ema_ramp=ramp)
    module.weight.data.fill_(values[0])
    average, expected, share = average_of(module, decay), values[0], 1.0
    for step, value in enumerate(values[1:], 1):
        module.weight.data.fill_(value)
        average.update(ramp_limit(training, 64 * step))
        now = decay if ramp is None else min(decay, 0.5 ** (1 / (ramp * step)))
        expected, share = now * expected + (1 - now) * value, share * now
    assert average.weights()["weight"].item() == pytest.approx(expected, rel=1e-5)
    assert initial_share(training) == pytest.approx(share)


def test_a_ramp_leaves_nothing_of_the_initial_weights() -> None:
    """While it limits, the share after n steps is ½ to the power of (1 + 1/2 + ... + 1/n) / ramp."""
    training = training_of(images=100 * 64, ema_decay=0.9999, ema_ramp=0.09)
    harmonic = sum(1 / step for step in range(1, 101))
    assert initial_share(training) == pytest.approx(0.5 ** (harmonic / 0.09))
    assert initial_share_warning("train_lightningdit", training) is None


def test_a_short_training_is_warned_of_its_initial_weights() -> None:
    training = training_of(images=3906 * 64, ema_decay=0.9999)
    assert initial_share(training) == pytest.approx(0.9999**3906)
    assert initial_share_warning("train_lightningdit", training) == (
        "train_lightningdit.ema_decay=0.9999: after 3,906 steps the average of the weights would still be 68% initial "
        "weights; set train_lightningdit.ema_ramp=0.09, lower the decay or raise train_lightningdit.images"
    )
    assert initial_share_warning("train_vavae", training_of(images=64)) is None, "no average"
    enough = math.ceil(math.log(0.01) / math.log(0.99)) * 64
    assert initial_share_warning("train_vavae", training_of(images=enough, ema_decay=0.99)) is None
    assert initial_share_warning("train_vavae", training_of(images=enough - 64, ema_decay=0.99)) is not None


def test_further_averages_are_warned_of_too() -> None:
    averages = ({"name": "power", "std": 0.1}, {"name": "ramped", "decay": 0.9999, "ramp": 0.09})
    training = LightningDiTTrainingConfig(images=10 * 64, batch_size=64, ema_decay=0.5, averages=averages)
    assert initial_share_warning("train_lightningdit", training) is None
    long = LightningDiTTrainingConfig(**{**training.model_dump(), "averages": ({"name": "long", "decay": 0.99},)})
    warning = initial_share_warning("train_lightningdit", long)
    assert warning is not None
    assert warning.startswith(
        "train_lightningdit.averages: long, decay=0.99: after 10 steps the average of the weights"
    )
    assert "90% initial weights; set its ramp=0.09" in warning


@pytest.mark.parametrize(("ramp", "rank", "lines"), [("null", 0, 1), ("null", 1, 0), ("0.09", 0, 0)])
def test_the_start_of_a_training_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ramp: str, rank: int, lines: int
) -> None:
    config = trained_run(tmp_path).storage.local_file("config.yaml")
    inputs = LightningDiTTrainingInputs.of(Run(load(RunConfig, config, [f"train_lightningdit.ema_ramp={ramp}"])))
    monkeypatch.setattr(train_module, "_train_lightningdit", lambda *_: None)
    train_module.train(inputs, LocalSession(), World(rank=rank, size=2))
    assert len(caplog.messages) == lines
    assert all("after 1 steps the average of the weights would still be 100%" in line for line in caplog.messages)


def test_a_training_with_a_ramp_resumes_bitwise_and_averages_by_images(tmp_path: Path) -> None:
    config = {"ema_decay": 0.5, "ema_ramp": 0.3, "checkpoint_images": 8}
    averages = {}
    for name, images, fields in (("straight", [40], config), ("halves", [12, 40], config), ("none", [40], {})):
        for until in images:
            step = ToyStep()
            train_toy(Storage(str(tmp_path / name)), step, images=until, **fields)
        averages[name] = step.ema.weights()["weight"]
    assert averages["halves"].equal(averages["straight"])
    assert not averages["none"].equal(averages["straight"])
