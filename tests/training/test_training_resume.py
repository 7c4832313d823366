"""A training that resumes in new processes is bitwise identical to one that was never interrupted."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.counting_store import counted
from support.engine_parity import OFFLOADED, TORCH, ZERO
from support.gloo import GlooLauncher
from support.training_steps import BATCH, JOBS, build_step, fill_empty_memory, tiny_config, without_signs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vavae.distributed.world import World
from vavae.models.tokenizer.teacher import VisionFoundationTeacher
from vavae.runs.jobs import Job
from vavae.storage.artifact import RECORD, read
from vavae.storage.storage import Storage
from vavae.tracking.tensorboard_tracker import TensorBoardTracker
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
    drawn: int
    """Random values that were drawn to build the step."""


class Draws(TorchDispatchMode):
    """Counts random values that are drawn, but for those that are only described."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in operator.tags and args[0].device.type != "meta":
            self.count += args[0].numel()
        return operator(*args, **(kwargs or {}))


def train_all(
    world: World, folder: Path, engine: dict[str, Any], images: int = _ALL, muon: dict[str, Any] | None = None
) -> dict[Job, End]:
    """Both trainings to the end of their budgets, with a checkpoint half way."""
    return {job: _train(world, folder / job, engine, job, images, muon) for job in JOBS}


def _train(
    world: World, folder: Path, engine: dict[str, Any], job: Job, images: int, muon: dict[str, Any] | None = None
) -> End:
    optimizer = {"learning_rate": 1e-3, "muon": muon}
    config = tiny_config(engine=engine, images=images, checkpoint_images=_HALF, log_images=_ROW, optimizer=optimizer)
    storage = Storage(str(folder))
    checkpoints = Checkpoints(storage, TrainState(images_seen=0, config="c", data="d"), Retention(2), world)
    fill_empty_memory()
    with Draws() as draws:
        step = build_step(job, config, world, awaits_checkpoint=checkpoints.images_seen() > 0)
    log = MetricsLog(job, storage.child("log"), [TensorBoardTracker(storage.child("tensorboard"))], world.is_first)
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
    return End(weights, rows, record.digest, draws.count)


def _interrupted(folder: Path, copy: Path) -> Path:
    """Copy a run as if it had died while it wrote its last checkpoint."""
    shutil.copytree(folder, copy)
    for job in JOBS:
        (copy / job / f"checkpoints/{_ALL:012d}" / RECORD).unlink()
    return copy


_MUON: dict[str, Any] = {"matrices": ["*"], "others": []}
"""All weights with rows and columns, of any network."""


@pytest.mark.parametrize(
    ("world_size", "engine", "muon"),
    [
        *((2, engine, None) for engine in (TORCH, ZERO[1], ZERO[2], ZERO[3], OFFLOADED[0])),
        (1, ZERO[0], None),
        (2, TORCH, _MUON),
    ],
)
def test_resumed_is_bitwise_identical_to_uninterrupted(
    gloo: GlooLauncher, tmp_path: Path, world_size: int, engine: dict[str, Any], muon: dict[str, Any] | None
) -> None:
    straight = gloo.run(world_size, train_all, tmp_path / "straight", engine, _ALL, muon)
    interrupted = _interrupted(tmp_path / "straight", tmp_path / "resumed")
    resumed = gloo.run(world_size, train_all, interrupted, engine, _ALL, muon)
    with Draws() as teacher:
        VisionFoundationTeacher(tiny_config().teacher)
    for job in JOBS:
        for ours, theirs in zip(resumed, straight, strict=True):
            assert [row["images"] for row in ours[job].rows] == [_HALF, _ROW, _ALL]
            assert ours[job].rows == theirs[job].rows
            assert ours[job].weights.keys() == theirs[job].weights.keys()
            assert all(ours[job].weights[name].equal(tensor) for name, tensor in theirs[job].weights.items())
            assert ours[job].checkpoint == theirs[job].checkpoint
            # No initialization precedes a checkpoint; a teacher without pretrained weights draws its own.
            assert ours[job].drawn == (teacher.count if job == "train_vavae" else 0) < theirs[job].drawn


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


class Fetched(NamedTuple):
    """Requests of a rank that restores a training of the LightningDiT from a store."""

    files: list[str]
    """Files of tensors of which it reads something, in order of the first request."""
    whole: int
    """Whole files that it fetches for its machine."""


def restore_from_store(world: World, folder: Path, engine: dict[str, Any], caches: Path, machines: int) -> Fetched:
    """Restore on ranks that are divided among machines, each of which has a cache."""
    storage = Storage(f"counting://{folder}", str(caches / str(world.rank * machines // world.size)))
    checkpoints = Checkpoints(storage, TrainState(images_seen=0, config="c", data="d"), Retention(2), world)
    step = build_step("train_lightningdit", tiny_config(engine=engine), world, awaits_checkpoint=True)
    fetched = Storage.counters.read().fetched_files
    state, requests = counted(lambda: checkpoints.restore(step))
    assert state.images_seen == BATCH
    paths = [request.path.split("/") for request in requests if request.kind == "get"]
    files = ["/".join(path[-2:]) for path in paths if path[-1].endswith(".safetensors")]
    return Fetched(files, Storage.counters.read().fetched_files - fetched)


def test_a_rank_begins_with_the_file_of_its_index_and_a_machine_fetches_each_file_once(
    gloo: GlooLauncher, tmp_path: Path
) -> None:
    ranks, machines = 4, 2
    weights, average = ([f"{part}/{rank:05d}.safetensors" for rank in range(ranks)] for part in ("lightningdit", "ema"))
    gloo.run(ranks, _train, tmp_path / "run", ZERO[3], "train_lightningdit", BATCH)
    whole, parts = (
        gloo.run(ranks, restore_from_store, tmp_path / "run", engine, tmp_path / engine["backend"], machines)
        for engine in (TORCH, ZERO[3])
    )
    for index in range(ranks):
        order = [*dict.fromkeys([weights[index], weights[0], *weights[index:], *weights[:index]])]
        # A rank's average, and with ZeRO stage 3 its weights, are its own alone; but rank 0 has saved the buffers.
        assert whole[index].files == [*order, average[index]]
        assert parts[index].files == [*order[: 2 if index else 1], average[index]]
    assert sum(rank.whole for rank in whole) == machines * ranks + ranks
    assert sum(rank.whole for rank in parts) == ranks + ranks, "each rank its own"
