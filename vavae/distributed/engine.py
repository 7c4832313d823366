"""One set of weights that all ranks optimise together: plain PyTorch here, DeepSpeed ZeRO next door.

An engine owns the module, its optimiser and the exchange of gradients. A step of the training loop is
`forward` and `backward` once per round, then one `update`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vavae.distributed.config import EngineConfig, OptimizerConfig, Precision
from vavae.distributed.fragments import Fragment, fragments_of, whole
from vavae.distributed.world import World

_STATE = "engine.pt"


class Engine(Protocol):
    """What the training loop may ask of a set of weights."""

    module: nn.Module
    """The module that is trained, on its device, callable without the engine's hooks."""
    layout: Mapping[str, str | int]
    """What `load` needs to be as it was at `save`, by the fields of the configuration that set it."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Call the module so that `backward` on a loss it returned reaches the optimiser."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one round's loss; gradients are averaged over rounds and ranks."""

    def update(self, learning_rate: float) -> float:
        """Apply the gradients of all rounds of a step; returns their global norm before clipping."""

    def fragments(self) -> dict[str, Fragment]:
        """This rank's part of the module's state dict, as trained and in place; see `fragments_of`."""

    def weights(self) -> dict[str, Tensor]:
        """The module's whole state dict, as trained, on the CPU. Called on every rank."""

    def save(self, folder: Path) -> None:
        """Write this rank's part of weights and optimiser state into an empty folder. Called on every rank."""

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote under the same `layout`, strictly. Called on every rank, with the files of all."""


class TorchEngine:
    """Plain PyTorch: whole weights and optimiser on every rank, gradients averaged in one flat reduction."""

    def __init__(self, module: nn.Module, optimizer: OptimizerConfig, world: World, rounds: int) -> None:
        self.module = module.to(world.device)
        self.layout: Mapping[str, str | int] = {"engine.backend": "torch"}
        self._world, self._rounds, self._max_norm = world, rounds, optimizer.max_grad_norm
        self._parameters = [p for p in self.module.parameters() if p.requires_grad]
        self._optimizer = build_optimizer(self._parameters, optimizer)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """See `Engine.forward`."""
        return self.module(*inputs, **named)

    def backward(self, loss: Tensor) -> None:
        """See `Engine.backward`."""
        (loss / self._rounds).backward()

    def update(self, learning_rate: float) -> float:
        """See `Engine.update`."""
        self._average_gradients()
        limit = float("inf") if self._max_norm is None else self._max_norm
        norm = nn.utils.clip_grad_norm_(self._parameters, limit)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _average_gradients(self) -> None:
        """Average over ranks. A gradient that no loss reached is zero, so that any world size updates alike."""
        gradients = []
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self._world.size == 1:
            return
        flat = self._world.sum(torch.cat([g.flatten() for g in gradients])) / self._world.size
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def fragments(self) -> dict[str, Fragment]:
        """See `Engine.fragments`."""
        return fragments_of(self.module, self._world)

    def weights(self) -> dict[str, Tensor]:
        """See `Engine.weights`."""
        return whole(self.fragments(), self._world)

    def save(self, folder: Path) -> None:
        """See `Engine.save`. All ranks hold the same, so the first one's state serves any number of them."""
        if self._world.is_first:
            state = {"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}
            torch.save(state, folder / _STATE)

    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        state = torch.load(folder / _STATE, map_location=self._world.device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])


def build_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW of `config`; fused, because the loop over parameters costs more than the arithmetic."""
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def build_engine(
    module: nn.Module,
    optimizer: OptimizerConfig,
    config: EngineConfig,
    precision: Precision,
    world: World,
    rounds: int,
    slice_size: int,
) -> Engine:
    """The engine that `config` names.

    Args:
        module: the module to train, in fp32; its initial weights are equal on all ranks.
        precision: of the networks in the module's forward, and of those that it is handed.
        rounds: forward and backward passes per update on every rank.
        slice_size: images of one round.
    """
    if precision == "bf16":
        # On the module, because DeepSpeed switches an autocast around its engine off, and its own would average
        # gradients in bf16. No cache: it would keep a second copy of all weights alive, whole ones in stage 3.
        module.forward = torch.autocast(world.device.type, torch.bfloat16, cache_enabled=False)(module.forward)
    if config.backend == "torch":
        return TorchEngine(module, optimizer, world, rounds)
    from vavae.distributed.deepspeed_engine import DeepSpeedEngine  # its import compiles and logs: only where used

    return DeepSpeedEngine(module, optimizer, config, world, rounds, slice_size)
