"""Training steps that take turns: the steps themselves, as the trainer takes them, on micro-batches in memory."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vavae.data.image_stream import ImageMicroBatch
from vavae.distributed.engine import Engine
from vavae.latents.stream import LatentMicroBatch
from vavae.randomness import torch_generator
from vavae.runs.training_config import TrainingConfig
from vavae.training.step import Step, StepResult

_SCALE = 0.02
"""Standard deviation of what is added to the weights."""


class StepTurns:
    """Some steps of a training a turn, on the same micro-batches again and again, after a first one.

    Args:
        step: the step.
        micro_batches: those of this rank, in the memory of the host.
        training: configuration of the training.
        steps: how many a turn takes.
    """

    def __init__(
        self,
        step: Step,
        micro_batches: Sequence[ImageMicroBatch] | Sequence[LatentMicroBatch],
        training: TrainingConfig,
        steps: int = 1,
    ) -> None:
        self.step, self._micro_batches, self._training, self._steps = step, micro_batches, training, steps
        self._taken = 0
        self.first = self._figures()
        """Losses and gradient norms of the first step by name: it has been taken."""

    def __call__(self) -> None:
        """Take the steps of a turn."""
        for _ in range(self._steps):
            self._take()

    def _take(self) -> StepResult:
        micro_batches = [item._replace(step=self._taken) for item in self._micro_batches]
        seen = self._taken * self._training.batch_size
        result = self.step.run(micro_batches, seen, self._training.optimizer.learning_rate)
        if self.step.ema is not None:
            self.step.ema.update()
        for average in self.step.averages.values():
            average.update_after(seen + self._training.batch_size)
        self._taken += 1
        return result

    def _figures(self) -> dict[str, float]:
        result = self._take()
        terms = {name: value.item() for name, value in result.terms.items()}
        return terms | {name: float(norm) for name, norm in result.gradient_norms.items()}


def disturb(engines: Mapping[str, Engine]) -> None:
    """Add small noise to all floating-point weights; see `disturbance`."""
    for engine in engines.values():
        with engine.restore(updates=0) as shards:
            for name, (offset, values, shape) in shards.items():
                if values.is_floating_point():
                    noise = disturbance(name, shape).flatten()[offset : offset + len(values)]
                    values.add_(noise.to(values.device))


def disturbance(name: str, shape: torch.Size) -> Tensor:
    """Noise to be added to the weight of a name, float32 in its shape.

    Some weights begin at zero, and whatever stands behind them would count for nothing in a comparison of outputs.
    """
    return _SCALE * torch.randn(shape, generator=torch_generator(0, "bench", name))


def assert_equal_steps(turns: Mapping[str, StepTurns], tolerance: float) -> None:
    """Assert that the first step of every side had the same losses and gradient norms, but for a relative tolerance."""
    (first, expected), *others = [(name, each.first) for name, each in turns.items()]
    for name, found in others:
        assert found.keys() == expected.keys(), f"{name} and {first} have other losses"
        for term, value in found.items():
            close = abs(value - expected[term]) <= tolerance * max(abs(value), abs(expected[term]))
            assert close, f"{term} of {name} is {value!r}, of {first} {expected[term]!r}"
