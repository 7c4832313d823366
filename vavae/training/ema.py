"""Exponential moving averages of weights, in fp32."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vavae.distributed.engine import Engine
from vavae.distributed.sharded_tensors import TensorShard, copy_shards, gather_full
from vavae.distributed.world import World
from vavae.runs.training_config import AverageConfig, LightningDiTTrainingConfig, TrainingConfig
from vavae.training.power_profiles import power_decay

_NOTICEABLE = 0.01
"""Share of the initial weights in an average from which on they are said to be there."""


class ExponentialMovingAverage:
    """Average of every floating-point entry of a state dict: average ← decay · average + (1 - decay) · weights.

    It is updated once a step. Each rank averages its own shards alone, in every engine.

    Args:
        engine: engine whose weights to average.
        decay: decay per step.
        world: the ranks.
    """

    def __init__(self, engine: Engine, decay: float, world: World) -> None:
        self._engine, self._decay, self._world = engine, decay, world
        present = {name: part for name, part in engine.tensor_shards().items() if part.values.is_floating_point()}
        self.tensor_shards = {
            name: part._replace(values=part.values.to(torch.float32, copy=True)) for name, part in present.items()
        }
        """This rank's shards of the average, fp32, by the names of the module's state dict."""
        # Views, which follow the weights: an engine updates and restores them in place.
        self._weights = [part.values for part in present.values()]
        self._averages = [part.values for part in self.tensor_shards.values()]

    @torch.no_grad()
    def update(self, limit: float = 1.0) -> None:
        """Update the average with the engine's present weights.

        Args:
            limit: largest decay of this update, see `ramp_limit`.
        """
        share = 1 - min(self._decay, limit)
        torch._foreach_lerp_(self._averages, [weights.float() for weights in self._weights], share)

    def weights(self) -> dict[str, Tensor]:
        """Gather the full averaged state dict on the CPU of rank 0; entries without average are as they are.

        Every rank calls it. It is empty on the others.
        """
        return gather_full({**self._engine.tensor_shards(), **self.tensor_shards}, self._world)

    def load(self, weights: Mapping[str, TensorShard]) -> None:
        """Load this rank's shards of an average, or more of it, strictly."""
        copy_shards({name: weights[name] for name in self.tensor_shards}, self.tensor_shards)


class FurtherAverage(ExponentialMovingAverage):
    """Average beside the one of `ema_decay`: by a decay with its ramp, or by a power profile.

    Args:
        engine: engine whose weights to average.
        config: decay or profile.
        batch_size: images of a step.
        world: the ranks.
    """

    def __init__(self, engine: Engine, config: AverageConfig, batch_size: int, world: World) -> None:
        super().__init__(engine, 1.0 if config.decay is None else config.decay, world)
        self._config, self._batch_size = config, batch_size

    def update_after(self, images_seen: int) -> None:
        """Update the average with the engine's present weights.

        Args:
            images_seen: with those of the step that made these weights.
        """
        std, ramp, size = self._config.std, self._config.ramp, self._batch_size
        self.update(_limit(ramp, size, images_seen) if std is None else power_decay(std, size, images_seen))


def ramp_limit(training: TrainingConfig, images_seen: int) -> float:
    """Limit the decay of an update so that its half-life is at most `ema_ramp` of the images seen; 1 without a ramp.

    That is ½ to the power of batch / (ramp · images seen), arXiv 2312.02696, appendix C.

    Args:
        training: configuration of the training.
        images_seen: with those of the step whose weights are averaged.
    """
    return _limit(training.ema_ramp, training.batch_size, images_seen)


def _limit(ramp: float | None, batch_size: int, images_seen: int) -> float:
    return 1.0 if ramp is None else 0.5 ** (batch_size / (ramp * images_seen))


def initial_share(training: TrainingConfig) -> float:
    """Share of the initial weights in the average at the end of a training: the product of the decays of its steps."""
    decay = training.ema_decay
    return 0.0 if decay is None else _initial_share(decay, training.ema_ramp, training)


def _initial_share(decay: float, ramp: float | None, training: TrainingConfig) -> float:
    if ramp is None:
        return decay**training.steps
    size = training.batch_size
    return math.prod(min(decay, _limit(ramp, size, step * size)) for step in range(1, training.steps + 1))


def initial_share_warning(job: str, training: TrainingConfig) -> str | None:
    """Line about initial weights in an average that a training exports; None where they are less than 1 % in all.

    In a power profile there are none.
    """
    decays = [(training.ema_decay, training.ema_ramp, f"{job}.ema_decay", f"{job}.ema_ramp")]
    for each in training.averages if isinstance(training, LightningDiTTrainingConfig) else ():
        place = f"{job}.averages: {each.name}"
        decays.append((each.decay, each.ramp, f"{place}, decay", "its ramp"))
    for decay, ramp, name, remedy in decays:
        share = 0.0 if decay is None else _initial_share(decay, ramp, training)
        if share > _NOTICEABLE:
            return (
                f"{name}={decay}: after {training.steps:,} steps the average of the weights would still be {share:.0%} "
                f"initial weights; set {remedy}=0.09, lower the decay or raise {job}.images"
            )
    return None
