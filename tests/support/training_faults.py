"""One attempt at a training in which something goes wrong on purpose, and a record of what the training drew."""

import errno
import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support.engine_parity import smooth_config, smooth_images, smooth_networks
from support.training_steps import BATCH, build_step, tiny_config

import vavae.training.checkpoints.checkpoint
import vavae.training.diffusion_step
import vavae.training.tokenizer_step
from vavae.distributed.world import World
from vavae.randomness import torch_generator
from vavae.runs.jobs import Job
from vavae.storage.artifact import read
from vavae.storage.storage import Storage
from vavae.tracking.tensorboard_tracker import TensorBoardTracker
from vavae.training.checkpoints.checkpoint import Checkpoints
from vavae.training.checkpoints.retention import Retention
from vavae.training.checkpoints.state import TrainState
from vavae.training.logging.log import MetricsLog, read_rows
from vavae.training.logging.metric_names import metric_info
from vavae.training.session import LocalSession
from vavae.training.step import Step, StepResult
from vavae.training.trainer import Trainer

STEPS, STEPS_PER_CHECKPOINT = 24, 3
KILLS: dict[str, tuple[Any, str]] = {
    "start-up": (Checkpoints, "_newest"),
    "conversion": (vavae.training.checkpoints.checkpoint, "fill_tensor_shards"),
    "host copy": (vavae.training.checkpoints.checkpoint, "_copies_on_cpu"),
    "upload": (vavae.training.checkpoints.checkpoint, "save_tensor_shards"),
    "commit": (vavae.training.checkpoints.checkpoint, "commit"),
}
"""Where a process may be killed, besides the middle of a step: as it enters a function."""


class Trouble(NamedTuple):
    """What happens to one rank."""

    kind: str
    """A place to be killed at, "stop" for a request to save and leave, or "store" for a store that refuses a file."""
    turn: int
    """At which time of coming there, from 0."""
    rank: int


class Attempt(NamedTuple):
    """How a training is tried."""

    job: Job
    world_size: int
    engine: dict[str, Any]
    trouble: Trouble | None = None


class _Session(LocalSession):
    """Asks to stop before one of its steps ends."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop

    def progress(self, progress: Any) -> None:
        """Silent."""

    def stop_requested(self) -> bool:
        return self._stop()


class _Turn:
    """Says yes once, at its time."""

    def __init__(self, turn: int, folder: Path, kind: str) -> None:
        self._left, self._mark = turn, folder / "landed" / f"{kind}-{os.getpid()}"

    def __call__(self) -> bool:
        self._left -= 1
        if self._left == -1:
            self._mark.parent.mkdir(exist_ok=True)
            self._mark.touch()
        return self._left == -1


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(step: Step, trouble: Trouble, folder: Path) -> Callable[[], bool]:
    """Prepare the trouble in this process; returns when to ask for a stop."""
    comes = _Turn(trouble.turn, folder, trouble.kind)
    if trouble.kind == "stop":
        return comes
    if trouble.kind == "store":
        put = Storage.create

        def refuse(storage: Storage, path: str) -> Any:
            if "safetensors" in path and comes():
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            return put(storage, path)

        Storage.create = refuse  # type: ignore[method-assign]
    elif trouble.kind == "step":
        for engine in step.engines.values():
            engine.backward = _deadly(engine.backward, comes)  # type: ignore[method-assign]
    else:
        owner, name = KILLS[trouble.kind]
        setattr(owner, name, _deadly(getattr(owner, name), comes))
    return lambda: False


def _deadly(function: Callable[..., Any], comes: Callable[[], bool]) -> Callable[..., Any]:
    def deadly(*arguments: Any, **named: Any) -> Any:
        if comes():
            _kill()
        return function(*arguments, **named)

    return deadly


class _Witness:
    """Writes down what the micro-batches of a rank hold and from which state their noise is drawn, as it happens."""

    def __init__(self, step: Step, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{os.getpid()}.jsonl").open("a")
        self._run = step.run
        step.run = self.run  # type: ignore[method-assign]
        for module in (vavae.training.diffusion_step, vavae.training.tokenizer_step):
            module.torch_generator = self._generator  # type: ignore[attr-defined]

    def run(self, micro_batches: Any, *arguments: Any, **named: Any) -> StepResult:
        smooth_images(micro_batches)
        for item in micro_batches:
            data = b"".join(value.numpy().tobytes() for value in item if isinstance(value, torch.Tensor))
            self._write(["slice", item.lane, item.step], data)
        result = self._run(micro_batches, *arguments, **named)
        self._file.flush()
        return result

    def _generator(self, seed: int, *key: Any, **device: Any) -> torch.Generator:
        generator = torch_generator(seed, *key, **device)
        self._write([*key], generator.get_state().numpy().tobytes())
        return generator

    def _write(self, key: list[Any], data: bytes) -> None:
        print(json.dumps([json.dumps(key), hashlib.sha256(data).hexdigest()]), file=self._file)


def try_training(world: World, attempt: Attempt, folder: Path) -> int:
    """Train on from wherever it stands; images seen in the end."""
    job, images = attempt.job, STEPS * BATCH
    interval = STEPS_PER_CHECKPOINT * BATCH
    config = tiny_config(
        engine=attempt.engine,
        images=images,
        checkpoint_images=interval,
        log_images=BATCH,
        optimizer={"learning_rate": 1e-4},
    )
    # On either side of a kink two engines may end up by rounding.
    step, storage = build_step(job, smooth_config(config), world), Storage(str(folder / "run"))
    smooth_networks(step)
    _Witness(step, folder / "seen")
    trouble, stop = attempt.trouble, lambda: False
    if trouble is not None and trouble.rank == world.rank:
        stop = _arm(step, trouble, folder)
    checkpoints = Checkpoints(storage, TrainState(images_seen=0, config="c", data="d"), Retention(2), world)
    log = MetricsLog(job, storage.child("log"), [TensorBoardTracker(storage.child("tensorboard"))], world.is_first)
    training, session = getattr(config, job), _Session(stop)
    trainer = Trainer(job, step, training, config.stream, checkpoints, log, session, world)
    return trainer.fit(range(images)).images_seen


class Outcome(NamedTuple):
    """What a training left behind."""

    rows: list[dict[str, float]]
    """Every step, without what is the clock's."""
    checkpoint: str
    """Digest of the last one: all bits of weights, optimizers and average of all ranks."""
    seen: dict[str, set[str]]
    """Digests of micro-batches and of generators, by lane, step and purpose; a single one each, if all is well."""


def outcome_of(folder: Path) -> Outcome:
    """Read it."""
    storage = Storage(str(folder / "run"))
    record = read(storage, f"checkpoints/{STEPS * BATCH:012d}")
    assert record is not None, "the last checkpoint is committed"
    rows = [
        {key: value for key, value in row.items() if not (key == "stage" or metric_info(key).of_machine)}
        for row in read_rows(storage.child("log"))
    ]
    seen: dict[str, set[str]] = {}
    for file in (folder / "seen").iterdir():
        for line in file.read_text().splitlines():
            if line.endswith("]"):  # the last one of a killed process may be cut
                key, found = json.loads(line)
                seen.setdefault(key, set()).add(found)
    return Outcome(rows, record.digest, seen)
