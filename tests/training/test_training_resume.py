"""A training that resumes in new processes is bitwise identical to one that was never interrupted."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.engine_parity import OFFLOADED, TORCH, ZERO
from support.gloo import GlooLauncher
from support.training_steps import BATCH, JOBS, build_step, tiny_config, without_signs
from torch import Tensor

from vavae.distributed.world import World
from vavae.runs.run import Job
from vavae.storage.artifact import RECORD, read
from vavae.storage.storage import Storage
from vavae.training.checkpoints.checkpoint import Checkpoints
from vavae.training.checkpoints.retention import Retention
from vavae.training.checkpoints.state import TrainState
from vavae.training.logging.log import MetricsLog, read_rows
from vavae.training.logging.metric_names import metric_info
from vavae.training.session import LocalSession
from vavae.training.trainer import Trainer

pytestmark = pytest.mark.gloo

_HALF, _ALL, _ROW = 2 * BATCH, 4 * BATCH, 3 * BATCH


class End(NamedTuple):
    """The end of a training on one rank."""

    weights: dict[str, Tensor]
    """Weights of all engines, and of the average."""
    rows: list[dict[str, float]]
    """All logged metrics, without those of the clock."""
    checkpoint: str
    """Digest of the last checkpoint, optimizers included."""


def train_all(world: World, folder: Path, engine: dict[str, Any], images: int = _ALL) -> dict[Job, End]:
    """Both trainings to the end of their budgets, with a checkpoint half way."""
    return {job: _train(world, folder / job, engine, job, images) for job in JOBS}


def _train(world: World, folder: Path, engine: dict[str, Any], job: Job, images: int) -> End:
    config = tiny_config(engine=engine, images=images, checkpoint_images=_HALF, log_images=_ROW)
    step, storage = build_step(job, config, world), Storage(str(folder))
    checkpoints = Checkpoints(storage, TrainState(images_seen=0, config="c", data="d"), Retention(2), world)
    log = MetricsLog(job, storage.child("log"), storage.child("tensorboard"), world.is_first)
    trainer = Trainer(job, step, getattr(config, job), config.stream, checkpoints, log, LocalSession(), world)
    trainer.fit(range(images))
    assert step.ema is not None
    weights = {f"ema.{name}": tensor for name, tensor in step.ema.weights().items()}
    for name, trained in step.engines.items():
        weights |= {f"{name}.{key}": tensor for key, tensor in trained.weights().items()}
    rows = [
        {key: value for key, value in row.items() if not (key == "stage" or metric_info(key).of_machine)}
        for row in read_rows(storage.child("log"))
    ]
    record = read(storage, f"checkpoints/{images:012d}")
    assert record is not None
    return End(weights, rows, record.digest)


def _interrupted(folder: Path, copy: Path) -> Path:
    """Copy a run as if it had died while it wrote its last checkpoint."""
    shutil.copytree(folder, copy)
    for job in JOBS:
        (copy / job / f"checkpoints/{_ALL:012d}" / RECORD).unlink()
    return copy


@pytest.mark.parametrize(
    ("world_size", "engine"), [(2, TORCH), (1, ZERO[0]), (2, ZERO[1]), (2, ZERO[2]), (2, ZERO[3]), (2, OFFLOADED[0])]
)
def test_resumed_is_bitwise_identical_to_uninterrupted(
    gloo: GlooLauncher, tmp_path: Path, world_size: int, engine: dict[str, Any]
) -> None:
    straight = gloo.run(world_size, train_all, tmp_path / "straight", engine)
    resumed = gloo.run(world_size, train_all, _interrupted(tmp_path / "straight", tmp_path / "resumed"), engine)
    for job in JOBS:
        for ours, theirs in zip(resumed, straight, strict=True):
            assert [row["images"] for row in ours[job].rows] == [_HALF, _ROW, _ALL]
            assert ours[job].rows == theirs[job].rows
            assert ours[job].weights.keys() == theirs[job].weights.keys()
            assert all(ours[job].weights[name].equal(tensor) for name, tensor in theirs[job].weights.items())
            assert ours[job].checkpoint == theirs[job].checkpoint


@pytest.fixture(scope="module")
def straight(gloo: GlooLauncher, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Job, End]]:
    """An uninterrupted run of two ranks."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, gloo.run(2, train_all, folder, ZERO[1])[0]


def _assert_alike(ours: dict[Job, End], theirs: dict[Job, End]) -> None:
    for job in JOBS:
        for row, other in zip(ours[job].rows[-2:], theirs[job].rows[-2:], strict=True):
            assert without_signs(row) == pytest.approx(without_signs(other), rel=1e-5)


@pytest.mark.parametrize(
    ("world_size", "engine"), [(3, ZERO[1]), (4, ZERO[3]), (1, ZERO[2]), (3, TORCH), (3, OFFLOADED[1])]
)
def test_any_number_of_ranks_and_any_engine_resumes(
    gloo: GlooLauncher, straight: tuple[Path, dict[Job, End]], tmp_path: Path, world_size: int, engine: dict[str, Any]
) -> None:
    resumed = gloo.run(world_size, train_all, _interrupted(straight[0], tmp_path / "resumed"), engine)
    _assert_alike(resumed[0], straight[1])


def test_two_three_four_and_one_rank_in_turn(
    gloo: GlooLauncher, straight: tuple[Path, dict[Job, End]], tmp_path: Path
) -> None:
    for turn, (world_size, engine) in enumerate([(2, ZERO[1]), (3, ZERO[2]), (4, ZERO[3]), (1, ZERO[1])]):
        ends = gloo.run(world_size, train_all, tmp_path / "run", engine, (turn + 1) * BATCH)
    _assert_alike(ends[0], straight[1])
