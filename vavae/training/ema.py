"""Exponential moving average of weights, in fp32."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vavae.distributed.engine import Engine
from vavae.distributed.sharded_tensors import TensorShard, gather_full
from vavae.distributed.world import World


class ExponentialMovingAverage:
    """average ← decay · average + (1 - decay) · weights, once a step, for every floating-point entry of a state dict.

    Each rank averages its own fragments alone, in every engine.

    Args:
        engine: whose weights to average.
        decay: per step.
        world: the ranks.
    """

    def __init__(self, engine: Engine, decay: float, world: World) -> None:
        self._engine, self._decay, self._world = engine, decay, world
        self.tensor_shards = {name: part._replace(values=part.values.clone()) for name, part in self._present().items()}
        """This rank's part of the average, fp32, by the names of the module's state dict."""

    def _present(self) -> dict[str, TensorShard]:
        parts = self._engine.tensor_shards()
        return {
            name: part._replace(values=part.values.float())
            for name, part in parts.items()
            if part.values.is_floating_point()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the engine's present weights in."""
        present = self._present()
        averages = [part.values for part in self.tensor_shards.values()]
        torch._foreach_lerp_(averages, [present[name].values for name in self.tensor_shards], 1 - self._decay)

    def weights(self) -> dict[str, Tensor]:
        """The averaged state dict, whole, on the CPU; entries that have no average are as they are. On every rank."""
        return gather_full({**self._engine.tensor_shards(), **self.tensor_shards}, self._world)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from an average that `weights` has told, strictly."""
        for name, (offset, values, shape) in self.tensor_shards.items():
            assert weights[name].shape == shape, f"{name}: the average of another module"
            values.copy_(weights[name].flatten()[offset : offset + len(values)])
