"""A training whose every step costs microseconds: one linear layer, for tests of what lies around the mathematics."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vavae.data.config import StreamConfig
from vavae.data.image_stream import MicroBatchKey
from vavae.data.sample_order import AccumulationStep
from vavae.distributed.config import EngineConfig, OptimizerConfig
from vavae.distributed.engine import TorchEngine
from vavae.distributed.world import World
from vavae.randomness import torch_generator
from vavae.runs.training_config import BestConfig, TrainingConfig
from vavae.storage.storage import Storage
from vavae.tracking.tensorboard_tracker import TensorBoardTracker
from vavae.tracking.tracker import Tracker
from vavae.training.callbacks.callback import Callback
from vavae.training.checkpoints.checkpoint import Checkpoints
from vavae.training.checkpoints.metrics import CheckpointMetrics
from vavae.training.checkpoints.retention import Retention
from vavae.training.checkpoints.state import TrainState
from vavae.training.ema import ExponentialMovingAverage, FurtherAverage
from vavae.training.initialize import initialized
from vavae.training.logging.log import MetricsLog
from vavae.training.logging.stopwatch import Stopwatch
from vavae.training.session import LocalSession, Session
from vavae.training.step import StepResult, StepState
from vavae.training.trainer import Trainer

ROUNDS = (AccumulationStep(lane=0, weight=1.0),)
FRESH = TrainState(images_seen=0, config="configuration", data="data")


class ToyStep:
    """Draws a batch of its own for every step, and remembers which steps it was asked for."""

    def __init__(self) -> None:
        self.model = initialized(0, "toy", lambda: nn.Linear(3, 1))
        self.engine = TorchEngine(self.model, OptimizerConfig(), EngineConfig(), World(), len(ROUNDS))
        self.engines = {"toy": self.engine}
        self.ema = ExponentialMovingAverage(self.engine, 0.5, World())
        self.averages: dict[str, FurtherAverage] = {}
        self.accumulation_steps = ROUNDS
        self.stopwatch = Stopwatch(World().device)
        self.rates: list[float] = []
        self.remembered: StepState = {}
        self.awaits_checkpoint = False

    def source(self) -> "ToyStep":
        """See `Step.source`."""
        return self

    def __getitem__(self, key: MicroBatchKey) -> Tensor:
        return torch.randn(4, 3, generator=torch_generator(0, "toy", *key))

    def run(
        self,
        micro_batches: Sequence[Tensor],
        images_seen: int,
        learning_rate: float,
        before_update: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """See `Step.run`."""
        self.rates.append(learning_rate)
        with self.stopwatch("forward"):
            loss = self.engine.forward(micro_batches[0]).square().mean()
        with self.stopwatch("backward"):
            self.engine.backward(loss)
        before_update()
        with self.stopwatch("optimizer"):
            norm = self.engine.update(learning_rate)
        return StepResult({"loss/total": loss.detach().double()}, {"gradient_norm/toy": norm})

    def state_dict(self) -> StepState:
        """See `Step.state_dict`."""
        return self.remembered

    def load_state_dict(self, state: StepState) -> None:
        """See `Step.load_state_dict`."""
        self.remembered = state
        self.awaits_checkpoint = False


def no_log() -> None:
    """Nothing was logged."""


def toy_checkpoints(
    storage: Storage,
    keep: int = 2,
    fresh: TrainState = FRESH,
    best: BestConfig | None = None,
    evaluations: CheckpointMetrics | None = None,
    owner: str = "a test",
) -> Checkpoints:
    """Checkpoints in a folder of the storage."""
    return Checkpoints(storage, fresh, Retention(keep, best, evaluations), World(), owner)


def train_toy(
    storage: Storage,
    step: ToyStep | None = None,
    session: Session | None = None,
    keep: int = 2,
    callbacks: Sequence[Callback] = (),
    evaluations: CheckpointMetrics | None = None,
    trackers: Sequence[Tracker] = (),
    **config: Any,
) -> TrainState:
    """The training loop on a toy step."""
    session = session or LocalSession()
    trackers = [TensorBoardTracker(storage.child("tensorboard")), *trackers]
    log = MetricsLog("toy", storage.child("log"), trackers, active=True, show=session.row)
    training = TrainingConfig(batch_size=4, **config)
    trainer = Trainer(
        "toy",
        step or ToyStep(),
        training,
        StreamConfig(),
        toy_checkpoints(storage, keep, best=training.keep_best, evaluations=evaluations),
        log,
        session,
        World(),
        callbacks,
    )
    return trainer.fit(range(training.images))
