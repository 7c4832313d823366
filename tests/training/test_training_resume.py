"""A run that goes on from a checkpoint, in new processes, is the run that was never interrupted."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.gloo import Nursery
from support.parity import TORCH, ZERO
from support.tiny import BATCH, JOBS, LANES, build_step, tiny_config
from torch import Tensor

from vavae.data.order import assign_lanes
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.storage.artefact import RECORD, read
from vavae.storage.storage import Storage
from vavae.training.checkpoint import Checkpoints, TrainState
from vavae.training.log import MetricsLog, read_rows
from vavae.training.loop import train
from vavae.training.run import Job
from vavae.training.session import LocalSession

pytestmark = pytest.mark.gloo

_HALF, _ALL, _ROW = 2 * BATCH, 4 * BATCH, 3 * BATCH


class End(NamedTuple):
    """What a rank is left with."""

    weights: dict[str, Tensor]
    """Of all engines, and the average."""
    rows: list[dict[str, float]]
    """All figures that were logged, but for those of the clock."""
    checkpoint: str
    """Digest of the last checkpoint, optimisers included."""


def train_all(world: World, folder: Path, engine: dict[str, Any]) -> dict[Job, End]:
    """Both trainings to the end of their budgets, with a checkpoint half way."""
    return {job: _train(world, folder / job, engine, job) for job in JOBS}


def _train(world: World, folder: Path, engine: dict[str, Any], job: Job) -> End:
    config = tiny_config(engine=engine, images=_ALL, checkpoint_images=_HALF, log_images=_ROW)
    step, storage = build_step(job, config, world), Storage(str(folder))
    checkpoints = Checkpoints(storage.child("checkpoints"), TrainState(images_seen=0, config="c", data="d"), 2, world)
    log = MetricsLog(job, storage.child("log"), storage.child("tensorboard"), world.is_first)
    rounds = assign_lanes(LANES, world.rank, world.size)
    train(job, step, rounds, range(_ALL), getattr(config, job), config.stream, checkpoints, log, LocalSession(), world)
    assert step.ema is not None
    weights = {f"ema.{name}": tensor for name, tensor in step.ema.weights().items()}
    for name, trained in step.engines.items():
        weights |= {f"{name}.{key}": tensor for key, tensor in trained.weights().items()}
    other = ("stage", "images_per_second", "data_wait")
    rows = [{key: value for key, value in row.items() if key not in other} for row in read_rows(storage.child("log"))]
    record = read(storage, f"checkpoints/{_ALL:012d}")
    assert record is not None
    return End(weights, rows, record.digest)


def _interrupted(folder: Path, copy: Path) -> Path:
    """What a run leaves that died while it wrote its last checkpoint."""
    shutil.copytree(folder, copy)
    for job in JOBS:
        (copy / job / f"checkpoints/{_ALL:012d}" / RECORD).unlink()
    return copy


@pytest.mark.parametrize(("world_size", "engine"), [(2, TORCH), (1, ZERO[0]), (2, ZERO[1]), (2, ZERO[2]), (2, ZERO[3])])
def test_resumed_is_bit_equal_to_uninterrupted(
    gloo: Nursery, tmp_path: Path, world_size: int, engine: dict[str, Any]
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


def test_another_number_of_ranks_goes_on_where_all_hold_the_whole_state(gloo: Nursery, tmp_path: Path) -> None:
    straight = gloo.run(2, train_all, tmp_path / "straight", TORCH)[0]
    resumed = gloo.run(3, train_all, _interrupted(tmp_path / "straight", tmp_path / "resumed"), TORCH)[0]
    for job in JOBS:
        for ours, theirs in zip(resumed[job].rows, straight[job].rows, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("engine", "field"),
    [
        (ZERO[1], "workers.count=2, which is 1 now"),
        (ZERO[2], "engine.zero_stage=1, which is 2 now"),
        (ZERO[3], "engine.zero_stage=1, which is 3 now"),
        (TORCH, "engine.backend=deepspeed, which is torch now"),
    ],
)
def test_state_of_other_engines_is_refused(
    gloo: Nursery, partitioned: Path, tmp_path: Path, engine: dict[str, Any], field: str
) -> None:
    world_size = 1 if "workers" in field else 2
    folder = _interrupted(partitioned, tmp_path / "resumed")
    with pytest.raises(UserError, match=f"{_HALF:012d}: saved with {field}; set it back"):
        gloo.run(world_size, train_all, folder, engine)


@pytest.fixture(scope="module")
def partitioned(gloo: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose optimiser lies in parts on two ranks."""
    folder = tmp_path_factory.mktemp("runs") / "partitioned"
    gloo.run(2, train_all, folder, ZERO[1])
    return folder
