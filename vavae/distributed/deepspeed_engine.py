"""DeepSpeed ZeRO behind the `Engine` interface. The only module that imports DeepSpeed."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vavae.distributed.config import EngineConfig, OptimizerConfig
from vavae.distributed.world import World
from vavae.errors import UserError

# Read once, when DeepSpeed is imported: without it a CPU worker on a GPU node would pick the GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed

from vavae.distributed.engine import build_optimizer

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

_TAG = "engine"


class DeepSpeedEngine:
    """A module trained by DeepSpeed ZeRO; see `Engine` for what each method promises."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        config: EngineConfig,
        world: World,
        rounds: int,
        slice_size: int,
    ) -> None:
        if world.device.type == "cpu":
            # Otherwise DeepSpeed compiles a shared-memory all-reduce for minutes; gloo does the same work.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
        )
        self._world = world
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer([p for p in module.parameters() if p.requires_grad], optimizer),
            config={
                "train_micro_batch_size_per_gpu": slice_size,
                "gradient_accumulation_steps": rounds,
                "gradient_clipping": optimizer.max_grad_norm or 0.0,
                "zero_optimization": {"stage": config.zero_stage},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 1 << 62,
            },
            dist_init_required=False,
        )
        self.module: nn.Module = self._engine.module

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """See `Engine.forward`."""
        return self._engine(*inputs, **named)

    def backward(self, loss: Tensor) -> None:
        """See `Engine.backward`."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def update(self, learning_rate: float) -> float:
        """See `Engine.update`."""
        assert self._engine.is_gradient_accumulation_boundary(), "update before the last round of the step"
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        self._engine.save_checkpoint(str(folder), tag=_TAG)

    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        parts = len(list((folder / _TAG).glob("*optim_states.pt")))
        if parts not in (0, self._world.size):
            raise UserError(f"{folder}: written by {parts} workers, not {self._world.size}; set workers.count={parts}")
        self._engine.load_checkpoint(str(folder), tag=_TAG)
