"""What a step object is: the mathematics of one optimizer step, with the order of things left to the loop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from vavae.data.image_stream import MicroBatchSource
from vavae.data.sample_order import AccumulationStep
from vavae.distributed.engine import Engine
from vavae.training.ema import ExponentialMovingAverage
from vavae.training.logging.stopwatch import Stopwatch


@dataclass(frozen=True)
class StepResult:
    """What one step says of itself."""

    terms: Mapping[str, Tensor]
    """Scalars of this rank; summed over ranks they are means over the global batch."""
    gradient_norms: Mapping[str, float]
    """Global gradient norm per engine that was updated; equal on all ranks."""
    ratios: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Sums and counts of this rank, whose quotient after summing over ranks and steps is a mean."""


class StepWeights(NamedTuple):
    """The weights of a step, whole and on the CPU."""

    engines: Mapping[str, Mapping[str, Tensor]]
    """State dicts by the names of the engines."""
    average: Mapping[str, Tensor] | None
    """Of the averaged one, if it is averaged."""


StepState = Mapping[str, Sequence[float | None]]
"""What a step remembers besides its weights: by lane."""


class Step(Protocol):
    """One kind of training: its weights, its data and its arithmetic."""

    @property
    def engines(self) -> Mapping[str, Engine]:
        """All sets of weights that the step optimizes, by the names of their checkpoint folders."""

    @property
    def stopwatch(self) -> Stopwatch:
        """The time of its phases: `forward`, `backward` and `optimizer`."""

    @property
    def ema(self) -> ExponentialMovingAverage | None:
        """The average of the weights that is exported, if there is one."""

    def source(self) -> MicroBatchSource[Any]:
        """Where micro-batches come from."""

    def run(self, micro_batches: Sequence[Any], images_seen: int, learning_rate: float) -> StepResult:
        """Forward and backward for every micro-batch of this rank, then one update of the weights."""

    def state_dict(self) -> StepState:
        """What a checkpoint has to hold besides weights and optimizers, for the lanes of this rank."""

    def load_state_dict(self, memory: StepState) -> None:
        """Restore what all ranks remembered."""


class TermSum:
    """Weighted means of the terms of a step's rounds, kept on the device until somebody asks."""

    def __init__(self, accumulation_steps: Sequence[AccumulationStep], world_size: int) -> None:
        self._share = 1.0 / (len(accumulation_steps) * world_size)
        self.terms: dict[str, Tensor] = {}

    def add(self, turn: AccumulationStep, terms: Mapping[str, Tensor]) -> None:
        """Add the terms of one round. A weight-0 round adds nothing, not even its NaN."""
        if turn.weight == 0:
            return
        for name, value in terms.items():
            part = value.detach().double() * (turn.weight * self._share)
            self.terms[name] = self.terms[name] + part if name in self.terms else part
