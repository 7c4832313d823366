"""The step object's interface: the mathematics of one optimizer step. The order of things is the trainer's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vavae.data.image_stream import MicroBatchSource
from vavae.data.sample_order import AccumulationStep
from vavae.distributed.compilation import compiles_blocks
from vavae.distributed.config import WorkersConfig
from vavae.distributed.engine import Engine
from vavae.distributed.sharded_tensors import TensorShard
from vavae.runs.training_config import TrainingConfig
from vavae.training.ema import ExponentialMovingAverage, FurtherAverage
from vavae.training.logging.stopwatch import Stopwatch


@dataclass(frozen=True)
class StepResult:
    """Metrics of one step."""

    terms: Mapping[str, Tensor]
    """Scalars [] of this rank by name, float64; summed over ranks they are means over the global batch."""
    gradient_norms: Mapping[str, Tensor]
    """Global gradient norm [] per engine; equal on all ranks. Where one is not finite no engine has been updated."""
    ratios: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Sums and counts [] of this rank, whose quotient after summing over ranks and steps is a mean."""


def variances(outputs: Tensor, data: Tensor) -> Tensor:
    """Variances of outputs and of the data that they should be, both [S, C, H, W], detached; float64 [2].

    They are taken between images, where outputs that are the same for all have none; of one image between positions.
    """
    axes = (0,) if len(data) > 1 else (-2, -1)
    both = [values.detach().float().var(axes, correction=0).mean() for values in (outputs, data)]
    return torch.stack(both).double()


def compiles(training: TrainingConfig, workers: WorkersConfig, device: torch.device) -> bool:
    """Return whether a training compiles the blocks of its networks, see `compiles_blocks`."""
    return compiles_blocks(training.compile_blocks, workers, device, training.engine.has_whole_weights)


class StepWeights(NamedTuple):
    """The weights of a step, as far as a rank holds them."""

    engines: Mapping[str, Mapping[str, TensorShard]]
    """Shards of state dicts by the names of the engines, see `Engine.local_shards`."""
    average: Mapping[str, TensorShard] | None
    """Shards of the average, if there is one."""


StepState = Mapping[str, Sequence[float | None]]
"""Values that a step keeps besides its weights, by lane."""


class Step(Protocol):
    """Step object of a training: its weights, its data and its mathematics."""

    awaits_checkpoint: bool
    """True where it was built without values of its weights, until a checkpoint is loaded into it."""

    @property
    def engines(self) -> Mapping[str, Engine]:
        """Engines of all sets of weights that the step optimizes, by the names of their checkpoint folders."""

    @property
    def accumulation_steps(self) -> Sequence[AccumulationStep]:
        """Accumulation steps of this rank in every step."""

    @property
    def stopwatch(self) -> Stopwatch:
        """Clock of its phases: `forward`, `backward` and `optimizer`."""

    @property
    def ema(self) -> ExponentialMovingAverage | None:
        """Average of the weights, which is exported, if there is one."""

    @property
    def averages(self) -> Mapping[str, FurtherAverage]:
        """Further averages of the same weights, by name."""

    def source(self) -> MicroBatchSource[Any]:
        """Return the source of micro-batches."""

    def run(
        self,
        micro_batches: Sequence[Any],
        images_seen: int,
        learning_rate: float,
        before_update: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Run forward and backward for every micro-batch of this rank, then update the weights once.

        Args:
            micro_batches: one for each accumulation step.
            images_seen: before the step.
            learning_rate: of the first engine.
            before_update: called before the weights change, while a GPU computes their gradients: work of the host
                for which it does not wait.
        """

    def state_dict(self) -> StepState:
        """Return the state besides weights and optimizers that a checkpoint holds, for the lanes of this rank."""

    def load_state_dict(self, state: StepState) -> None:
        """Restore the state of all ranks."""


class TermSum:
    """Weighted means of the terms of a step's micro-batches, kept on the device until somebody asks."""

    def __init__(self, accumulation_steps: int, world_size: int) -> None:
        self._share = 1.0 / (accumulation_steps * world_size)
        self.terms: dict[str, Tensor] = {}

    def add(self, weight: float, terms: Mapping[str, Tensor]) -> None:
        """Add the terms of one accumulation step, scalars []. One of weight 0 adds nothing, not even its NaN."""
        if weight == 0:
            return
        for name, value in terms.items():
            part = value.detach().double() * (weight * self._share)
            self.terms[name] = self.terms[name] + part if name in self.terms else part
