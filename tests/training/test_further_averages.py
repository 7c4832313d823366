"""Averages beside the exported one: in every engine, across interruptions, and in snapshots that stay."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.engine_parity import TORCH, ZERO
from support.gloo import GlooLauncher
from support.training_steps import BATCH, build_step, fill_empty_memory, tiny_config
from torch import Tensor

from vavae.distributed.world import World
from vavae.interop.averages import load_weights
from vavae.runs.checkpoints import average_set
from vavae.runs.config import RunConfig
from vavae.runs.training_config import AverageConfig, LightningDiTTrainingConfig
from vavae.storage.artifact import RECORD, read
from vavae.storage.storage import Storage
from vavae.training.checkpoints.checkpoint import Checkpoints
from vavae.training.checkpoints.retention import Retention
from vavae.training.checkpoints.snapshots import SNAPSHOTS, find_snapshots
from vavae.training.checkpoints.state import TrainState
from vavae.training.logging.log import MetricsLog
from vavae.training.power_profiles import power_decay
from vavae.training.session import LocalSession
from vavae.training.step import Step
from vavae.training.trainer import Trainer

ENGINES = {"torch": TORCH, **{f"zero{stage}": engine for stage, engine in enumerate(ZERO)}}
STEPS = 5
NARROW, WIDE, DECAYED = "narrow", "wide", "decayed"
AVERAGES = (
    AverageConfig(name=NARROW, std=0.05),
    AverageConfig(name=WIDE, std=0.2),
    AverageConfig(name=DECAYED, decay=0.9, ramp=0.5),
)


class End(NamedTuple):
    """The end of a training."""

    weights: list[Mapping[str, Tensor]]
    """Full weights of rank 0 after each step."""
    averages: Mapping[str, Mapping[str, Tensor]]
    """Full averages at the end by name, with that of `ema_decay`."""
    records: list[str]
    """Digests of the last checkpoint and of the snapshots."""


class _Recorder:
    """Keeps the weights of every step."""

    every_images = BATCH

    def __init__(self) -> None:
        self.weights: list[Mapping[str, Tensor]] = []

    def on_interval(self, step: Step, images_seen: int, log: MetricsLog) -> None:
        (engine,) = step.engines.values()
        self.weights.append(engine.weights())


def _training(engine: dict[str, Any], keep: int) -> tuple[RunConfig, LightningDiTTrainingConfig]:
    config = tiny_config(engine=engine, images=STEPS * BATCH, checkpoint_images=STEPS * BATCH, keep_checkpoints=keep)
    fields = {"averages": AVERAGES, "average_snapshot_images": 2 * BATCH}
    training = LightningDiTTrainingConfig.model_validate({**config.train_lightningdit.model_dump(), **fields})
    return config.model_copy(update={"train_lightningdit": training}), training


def train_all(world: World, folder: Path, keep: int) -> dict[str, End]:
    """The LightningDiT's training under every engine, from the checkpoints that are there."""
    return {name: _train(world, Storage(str(folder / name)), engine, keep) for name, engine in ENGINES.items()}


def _train(world: World, storage: Storage, engine: dict[str, Any], keep: int) -> End:
    config, training = _training(engine, keep)
    job, retention = "train_lightningdit", Retention.of(storage, training)
    checkpoints = Checkpoints(storage, TrainState(images_seen=0, config="c", data="d"), retention, world)
    fill_empty_memory()
    step = build_step(job, config, world, awaits_checkpoint=checkpoints.images_seen() > 0)
    log, recorder = MetricsLog(job, storage.child("log"), [], world.is_first), _Recorder()
    trainer = Trainer(job, step, training, config.stream, checkpoints, log, LocalSession(), world, [recorder])
    trainer.fit(range(training.images))
    assert step.ema is not None
    averages = {"": step.ema.weights(), **{name: average.weights() for name, average in step.averages.items()}}
    folders = [f"checkpoints/{training.images:012d}", *(f"snapshots/{n * BATCH:012d}" for n in (2, 4))]
    records = [read(storage, folder) for folder in folders]
    assert all(record is not None for record in records)
    return End(recorder.weights, averages, [record.digest for record in records if record is not None])


def _interrupted(folder: Path, copy: Path) -> Path:
    """Copy a training as if it had died between the last snapshot, the second, and the checkpoint of that moment."""
    shutil.copytree(folder, copy)
    for name in ENGINES:
        for seen in (4, 5):
            shutil.rmtree(copy / name / f"checkpoints/{seen * BATCH:012d}")
    return copy


@pytest.mark.gloo
def test_every_engine_averages_alike_and_resumes_to_the_same_bits(gloo: GlooLauncher, tmp_path: Path) -> None:
    straight = gloo.run(2, train_all, tmp_path / "straight", 3)[0]
    again = gloo.run(2, train_all, _interrupted(tmp_path / "straight", tmp_path / "resumed"), 1)[0]
    for name, end in straight.items():
        expected = end.weights[0]
        for step, weights in enumerate(end.weights[1:], 2):
            share = 1 - power_decay(0.05, BATCH, step * BATCH)
            expected = {key: torch.lerp(expected[key], weights[key], share) for key in weights}
        assert end.averages.keys() == {"", NARROW, WIDE, DECAYED}
        torch.testing.assert_close(end.averages[NARROW], expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(end.averages, straight["torch"].averages, rtol=0, atol=1e-5)
        moved = [tensor for key, tensor in end.averages[WIDE].items() if not tensor.equal(end.averages[NARROW][key])]
        assert len(moved) > 20
        assert len(again[name].weights) == STEPS - 2, "resumed from the checkpoint of the first snapshot"
        for key, average in end.averages.items():
            assert all(again[name].averages[key][one].equal(tensor) for one, tensor in average.items())
        assert again[name].records == end.records
        training = Storage(str(tmp_path / "resumed" / name))
        assert find_snapshots(training) == [2 * BATCH, 4 * BATCH]
        assert len(training.list("checkpoints")) == 1, "snapshots stay where checkpoints go"
        for snapshot in training.list(SNAPSHOTS):
            (attempt,) = [path for path in training.list(snapshot) if not path.endswith(RECORD)]
            sets = [path.rpartition("/")[2] for path in training.list(attempt)]
            assert sets == [f"ema-{NARROW}", f"ema-{WIDE}", "parts"], "and hold power profiles alone"
        read_back = {key: torch.zeros_like(tensor) for key, tensor in end.averages[DECAYED].items()}
        load_weights(training, STEPS * BATCH, read_back, average_set(DECAYED))
        assert all(tensor.equal(end.averages[DECAYED][key]) for key, tensor in read_back.items())
