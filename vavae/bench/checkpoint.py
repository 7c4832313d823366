"""Benchmark of how long a checkpoint holds a training up."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vavae.bench.benchmark import VAVAE_SIDE, Benchmark
from vavae.data.image_stream import MicroBatchSource
from vavae.distributed.config import EngineConfig, OptimizerConfig
from vavae.distributed.engine import Engine, TorchEngine
from vavae.distributed.world import World
from vavae.storage.storage import Storage
from vavae.training.checkpoints.checkpoint import Checkpoints
from vavae.training.checkpoints.retention import Retention
from vavae.training.checkpoints.state import TrainState
from vavae.training.ema import FurtherAverage
from vavae.training.logging.stopwatch import Stopwatch
from vavae.training.step import StepResult, StepState

_WIDTH = 1024
_FRESH = TrainState(images_seen=0, config="bench", data="bench")


class _TrainedStep:
    """Training step after one update, so that its optimizer has moments: as much of a step as a checkpoint needs."""

    ema, accumulation_steps, awaits_checkpoint = None, (), False

    def __init__(self, parameters: int, device: torch.device) -> None:
        world = World(device=device)
        layers = [nn.Linear(_WIDTH, _WIDTH) for _ in range(max(1, parameters // (_WIDTH * _WIDTH)))]
        engine = TorchEngine(nn.Sequential(*layers), OptimizerConfig(), EngineConfig(), world, accumulation_steps=1)
        engine.backward(engine.forward(torch.ones(1, _WIDTH, device=device)).sum())
        engine.update(1e-4)
        self.engines: Mapping[str, Engine] = {"model": engine}
        self.averages: Mapping[str, FurtherAverage] = {}
        self.stopwatch = Stopwatch(device)

    def source(self) -> MicroBatchSource[Any]:
        """Refuse: nothing is read here."""
        raise NotImplementedError

    def run(
        self,
        micro_batches: Sequence[Any],
        images_seen: int,
        learning_rate: float,
        before_update: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Refuse: nothing is trained here."""
        raise NotImplementedError

    def state_dict(self) -> StepState:
        """Empty state."""
        return {}

    def load_state_dict(self, state: StepState) -> None:
        """Ignore the state, which is empty."""

    def tensors(self) -> list[Tensor]:
        """Tensors that a checkpoint holds."""
        return [part.values for e in self.engines.values() for part in {**e.tensor_shards(), **e.moments()}.values()]


@contextmanager
def stall_benchmark(parameters: int, device: torch.device) -> Iterator[Benchmark]:
    """Seconds for which one checkpoint on a local disk holds a training up.

    It is written by a thread, as vavae does; written at once; and no more than copied, the least that anything can do.

    Args:
        parameters: of the model, about; a checkpoint holds three numbers of four bytes for each.
        device: where they are.
    """
    trained, seen = _TrainedStep(parameters, device), 0
    with tempfile.TemporaryDirectory(prefix="vavae-") as folder:
        checkpoints = Checkpoints(Storage(folder), _FRESH, Retention(1), World(device=device))

        def save() -> float:
            nonlocal seen
            seen += 1
            start = time.perf_counter()
            checkpoints.save(trained, _FRESH.after(seen), {}, lambda: None)
            return time.perf_counter() - start

        def in_a_thread() -> float:
            seconds = save()
            checkpoints.wait_for_pending_save()
            return seconds

        def at_once() -> float:
            start = time.perf_counter()
            save()
            checkpoints.wait_for_pending_save()
            return time.perf_counter() - start

        def copied() -> float:
            start = time.perf_counter()
            copies = [tensor.to("cpu", copy=True) for tensor in trained.tensors()]
            seconds = time.perf_counter() - start
            assert len(copies) > 0, "a model has weights"
            return seconds

        sides = {VAVAE_SIDE: in_a_thread, "writing at once": at_once, "the copy alone": copied}
        yield Benchmark(f"checkpoint of {12 * parameters // 2**20} MiB", "s held up", sides, less_is_better=True)
