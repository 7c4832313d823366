"""Engines, which optimize one set of weights on all ranks together: the protocol, and the one of plain PyTorch.

An engine owns the module, its optimizer and the exchange of gradients. A step of the training loop is
`forward` and `backward` once per accumulation step, then one `update`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vavae.distributed.config import EngineConfig, OptimizerConfig
from vavae.distributed.gradient_buckets import GradientBuckets
from vavae.distributed.muon import MuonWithAdamW, matrix_shapes
from vavae.distributed.sharded_tensors import (
    TensorShard,
    as_full_shard,
    gather_full,
    local_shards,
    shard_of,
    tensor_shards_of,
)
from vavae.distributed.world import World


class Engine(Protocol):
    """Interface of the training loop to a set of weights and its optimizer."""

    module: nn.Module
    """The module that is trained, on its device, callable without the engine's hooks."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Call the module so that `backward` on a loss it returned reaches the optimizer."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one accumulation step's loss; they are averaged over accumulation steps and ranks."""

    def update(self, learning_rate: float) -> Tensor:
        """Apply the gradients of all accumulation steps; return their global norm before clipping, float32 [].

        Where that is not finite nothing is applied, on any rank.
        """

    def tensor_shards(self) -> dict[str, TensorShard]:
        """Shards of this rank of the module's state dict, as trained and in place; see `tensor_shards_of`."""

    def local_shards(self) -> dict[str, TensorShard]:
        """All that this rank holds of the module's state dict, in place; see `local_shards`."""

    def weights(self) -> dict[str, Tensor]:
        """Full state dict of the module, as trained, on the CPU of rank 0; empty elsewhere. Called on every rank."""

    @property
    def updates(self) -> int:
        """Number of updates that the optimizer has made."""

    def moments(self) -> dict[str, TensorShard]:
        """Shards of this rank of the optimizer's moments, in place, by `<kind>/<parameter>`; empty before an update."""

    def restore(self, updates: int) -> AbstractContextManager[dict[str, TensorShard]]:
        """Yield this rank's shards of weights and moments, to be filled in place; they apply at the end of the block.

        Args:
            updates: number of updates behind the moments; with 0 there are no moments.
        """


class TorchEngine:
    """Engine of plain PyTorch: full weights and optimizer on every rank.

    Gradients are averaged in buckets during the last backward pass of a step. The adaptive weights, which differentiate
    within the forward pass, do not come near: they accumulate nothing.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        config: EngineConfig,
        world: World,
        accumulation_steps: int,
    ) -> None:
        self.module = module.to(world.device)
        self._world, self._accumulation_steps, self._max_norm = world, accumulation_steps, optimizer.max_grad_norm
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._parameters = [*trained.values()]
        self._optimizer = build_optimizer(trained, optimizer, config, world)
        self._buckets = GradientBuckets(self._parameters, config, world) if world.size > 1 else None
        self._passes = 0

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Call the module, see `Engine.forward`."""
        return self.module(*inputs, **named)

    def backward(self, loss: Tensor) -> None:
        """Add gradients of one accumulation step, see `Engine.backward`."""
        self._passes += 1
        if self._buckets is not None and self._passes == self._accumulation_steps:
            self._buckets.begin()
        (loss / self._accumulation_steps).backward()

    def update(self, learning_rate: float) -> Tensor:
        """Apply the gradients of a step, see `Engine.update`. The host waits for nothing."""
        assert self._passes == self._accumulation_steps, "update before the last accumulation step"
        self._passes = 0
        if self._buckets is not None:
            self._buckets.average()
        else:
            for parameter in self._parameters:
                if parameter.grad is None:  # no loss reached it; so that any world size updates alike
                    parameter.grad = torch.zeros_like(parameter)
        limit = float("inf") if self._max_norm is None else self._max_norm
        norm = nn.utils.clip_grad_norm_(self._parameters, limit)
        prepare_update(self._optimizer, learning_rate, norm)
        self._optimizer.step()
        if self._buckets is None:
            self._optimizer.zero_grad(set_to_none=True)
        else:
            self._buckets.reset()
        return norm

    def tensor_shards(self) -> dict[str, TensorShard]:
        """Shards of the state dict, see `Engine.tensor_shards`."""
        return tensor_shards_of(self.module, self._world)

    def local_shards(self) -> dict[str, TensorShard]:
        """Full tensors of the state dict, see `Engine.local_shards`."""
        return local_shards(self.module, self._world)

    def weights(self) -> dict[str, Tensor]:
        """Full state dict on the CPU of rank 0, see `Engine.weights`."""
        return gather_full(self.tensor_shards(), self._world)

    @property
    def updates(self) -> int:
        """Number of updates so far, see `Engine.updates`."""
        return updates_of(self._optimizer)

    def moments(self) -> dict[str, TensorShard]:
        """Shards of the optimizer's moments, see `Engine.moments`."""
        return {name: shard_of(t, self._world) for name, t in full_moments(self.module, self._optimizer).items()}

    @contextmanager
    def restore(self, updates: int) -> Iterator[dict[str, TensorShard]]:
        """Yield shards to fill, see `Engine.restore`."""
        begin_at(self._optimizer, self._parameters, updates)
        moments = full_moments(self.module, self._optimizer)
        yield self.local_shards() | {name: as_full_shard(t) for name, t in moments.items()}


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, engine: EngineConfig, world: World
) -> torch.optim.Optimizer:
    """Build the optimizer of `config` for parameters by name; with Muon, for engines that do not partition them.

    AdamW is fused, because the loop over parameters costs more than the arithmetic.

    Raises:
        UserError: see `matrix_shapes`.
    """
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    matrices = {} if config.muon is None else matrix_shapes(shapes, config.muon)
    others = [parameter for name, parameter in parameters.items() if name not in matrices]
    adamw = torch.optim.AdamW(
        [{"params": others}], lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    if config.muon is None:
        return adamw
    return MuonWithAdamW(parameters, matrices, config.muon, adamw, world, engine.bucket_elements)


def prepare_update(optimizer: torch.optim.Optimizer, learning_rate: float, norm: Tensor) -> None:
    """Prepare a step of an optimizer of `build_optimizer`, which applies nothing where the norm is not finite.

    The device finds that out by itself, as it does for a `GradScaler`.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_factor", 1.0)
    optimizer.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]


_STEP, MOMENTS = "step", ("exp_avg", "exp_avg_sq")
"""Keys of AdamW's state of a parameter: a count of its updates, and two tensors of its shape."""


def _kinds(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[str, ...]:
    """Keys of the moments of a parameter."""
    return optimizer.moment_kinds(parameter, MOMENTS) if isinstance(optimizer, MuonWithAdamW) else MOMENTS


def updates_of(optimizer: torch.optim.Optimizer) -> int:
    """Number of updates that an optimizer of `build_optimizer` has made."""
    return max((int(state[_STEP]) for state in optimizer.state.values() if _STEP in state), default=0)


def begin_at(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], updates: int) -> None:
    """Give an optimizer of `build_optimizer` the state of so many updates, with moments of zero."""
    optimizer.state.clear()
    for parameter in parameters if updates else ():
        count = torch.tensor(float(updates), device=parameter.device)
        optimizer.state[parameter] = {
            _STEP: count,
            **{kind: torch.zeros_like(parameter) for kind in _kinds(optimizer, parameter)},
        }


def full_moments(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Full moments of parameters that are not partitioned, by `<kind>/<parameter>`; empty before an update."""
    if not updates_of(optimizer):
        return {}
    return {
        f"{kind}/{name}": optimizer.state.get(parameter, {}).get(kind, torch.zeros_like(parameter))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        for kind in _kinds(optimizer, parameter)
    }
