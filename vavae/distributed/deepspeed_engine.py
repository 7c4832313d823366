"""DeepSpeed ZeRO behind the `Engine` interface. The only module that imports DeepSpeed."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vavae.distributed.config import EngineConfig, OptimizerConfig
from vavae.distributed.fragments import Fragment, Partition, fragments_of, whole
from vavae.distributed.world import World

# Read once, when DeepSpeed is imported: without it a CPU worker on a GPU node would pick the GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed

from vavae.distributed.engine import build_optimizer

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

_TAG = "engine"
_ANY_NUMBER = 1 << 62


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
        _join(world)
        self._stage, self._world = config.zero_stage, world
        partitioned = {"workers.count": world.size} if self._stage > 0 else {}
        self.layout: Mapping[str, str | int] = {
            "engine.backend": config.backend,
            "engine.zero_stage": self._stage,
            **partitioned,
        }
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer([p for p in module.parameters() if p.requires_grad], optimizer),
            config={
                "train_micro_batch_size_per_gpu": slice_size,
                "gradient_accumulation_steps": rounds,
                "gradient_clipping": optimizer.max_grad_norm or 0.0,
                "zero_optimization": _zero_section(config),
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 1 << 62,
            },
            dist_init_required=False,
        )
        self.module: nn.Module = self._engine.module

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """See `Engine.forward`."""
        if self._stage == 3:
            self._allow_gradients_within()
        return self._engine(*inputs, **named)

    def _allow_gradients_within(self) -> None:
        """Let a graph be differentiated any number of times, as the adaptive weights do within the forward.

        Stage 3 gathers a layer's weights again for as many passes back through it as it had forward passes. In all
        further ones it would find them released.
        """
        for layer in self.module.modules():
            layer.applied_pre_backward_ref_cnt = _ANY_NUMBER  # type: ignore[assignment]

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
        # Stage 0 has plain gradients, averaged by now; DeepSpeed tells their norm only where they are partitioned.
        whole = nn.utils.get_total_norm(self._gradients()) if self._stage == 0 else None
        self._engine.step()
        return float(self._engine.get_global_grad_norm() if whole is None else whole)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.module.parameters() if p.grad is not None]

    def fragments(self) -> dict[str, Fragment]:
        """See `Engine.fragments`."""
        return fragments_of(self.module, self._world, _partition)

    def weights(self) -> dict[str, Tensor]:
        """See `Engine.weights`."""
        return whole(self.fragments(), self._world)

    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        self._engine.save_checkpoint(str(folder), tag=_TAG)

    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        assert path is not None, f"{folder}: no state of DeepSpeed's"


def _zero_section(config: EngineConfig) -> dict[str, int]:
    """DeepSpeed's `zero_optimization`."""
    section: dict[str, int] = {"stage": config.zero_stage}
    if config.persistence_threshold is not None:
        section["stage3_param_persistence_threshold"] = config.persistence_threshold
    return section


def _partition(parameter: nn.Parameter) -> Partition | None:
    """What stage 3 has left of a parameter on this rank."""
    values: Tensor | None = getattr(parameter, "ds_tensor", None)
    return None if values is None else Partition(values, parameter.ds_shape)  # type: ignore[attr-defined]


def _join(world: World) -> None:
    """Let DeepSpeed adopt the process group; a process on its own gets a group of one."""
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        assert world.size == 1, f"{world.size} ranks without a process group"
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if world.device.type == "cpu":
        # Otherwise DeepSpeed compiles a shared-memory all-reduce for minutes; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
