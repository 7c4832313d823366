"""Exponential moving average of weights, in fp32."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vavae.distributed.engine import Engine
from vavae.distributed.sharded_tensors import TensorShard, copy_shards, gather_full
from vavae.distributed.world import World


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
    def update(self) -> None:
        """Update the average with the engine's present weights."""
        torch._foreach_lerp_(self._averages, [weights.float() for weights in self._weights], 1 - self._decay)

    def weights(self) -> dict[str, Tensor]:
        """Gather the full averaged state dict on the CPU of rank 0; entries without average are as they are.

        Every rank calls it. It is empty on the others.
        """
        return gather_full({**self._engine.tensor_shards(), **self.tensor_shards}, self._world)

    def load(self, weights: Mapping[str, TensorShard]) -> None:
        """Load this rank's shards of an average, or more of it, strictly."""
        copy_shards({name: weights[name] for name in self.tensor_shards}, self.tensor_shards)
