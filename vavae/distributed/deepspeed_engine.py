"""DeepSpeed ZeRO behind the `Engine` interface. The only module that imports DeepSpeed."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vavae.distributed.config import EngineConfig, OptimizerConfig
from vavae.distributed.sharded_tensors import (
    Partition,
    TensorShard,
    as_full_shard,
    gather_full,
    local_shards,
    shard_of,
    tensor_shards_of,
)
from vavae.distributed.world import World

# Read once, when DeepSpeed is imported: without it a CPU worker on a GPU node would pick the GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.utils import safe_get_local_optimizer_state

from vavae.distributed.engine import MOMENTS, begin_at, build_optimizer, full_moments, prepare_update, updates_of

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

_ANY_NUMBER = 1 << 62


class DeepSpeedEngine:
    """A module trained by DeepSpeed ZeRO; see `Engine` for what each method promises."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        config: EngineConfig,
        world: World,
        accumulation_steps: int,
        micro_batch_size: int,
    ) -> None:
        _join(world)
        self._zero_stage, self._world = config.zero_stage, world
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = build_optimizer(self._parameters, optimizer, config, world)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self.optimizer,
            config={
                "train_micro_batch_size_per_gpu": micro_batch_size,
                "gradient_accumulation_steps": accumulation_steps,
                "gradient_clipping": optimizer.max_grad_norm or 0.0,
                "zero_optimization": _zero_section(config, world),
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "communication_data_type": config.communication_data_type,
                "steps_per_print": 1 << 62,
                "timers": {"throughput": {"enabled": False}},  # it would synchronize the GPU twice per micro-batch
            },
            dist_init_required=False,
        )
        self.module: nn.Module = self._engine.module

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Call the module, see `Engine.forward`."""
        if self._zero_stage == 3:
            self._allow_gradients_within()
        return self._engine(*inputs, **named)

    def _allow_gradients_within(self) -> None:
        """Let a graph be differentiated any number of times, as the adaptive weights do within the forward.

        ZeRO stage 3 gathers a layer's weights again for as many passes back through it as it had forward passes. In all
        further ones it would find them released.
        """
        for layer in self.module.modules():
            layer.applied_pre_backward_ref_cnt = _ANY_NUMBER  # type: ignore[assignment]

    def backward(self, loss: Tensor) -> None:
        """Add gradients of one accumulation step, see `Engine.backward`."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def update(self, learning_rate: float) -> Tensor:
        """Apply the gradients of a step, see `Engine.update`. DeepSpeed waits for the device by itself."""
        assert self._engine.is_gradient_accumulation_boundary(), "update before the last accumulation step"
        if self._zero_stage == 0:
            return self._update_unpartitioned(learning_rate)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        # What it does not apply it does not measure either.
        norm = math.inf if self._engine.optimizer.overflow else self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32)

    def _update_unpartitioned(self, learning_rate: float) -> Tensor:
        """Update at ZeRO stage 0: plain averaged gradients, whose norm DeepSpeed neither returns nor checks."""
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])
        prepare_update(self.optimizer, learning_rate, norm)
        self._engine.step()
        return norm

    def tensor_shards(self) -> dict[str, TensorShard]:
        """Shards of the state dict, see `Engine.tensor_shards`."""
        return tensor_shards_of(self.module, self._world, _partition)

    def local_shards(self) -> dict[str, TensorShard]:
        """Local values of the state dict, see `Engine.local_shards`."""
        return local_shards(self.module, self._world, _partition)

    def weights(self) -> dict[str, Tensor]:
        """Full state dict on the CPU of rank 0, see `Engine.weights`."""
        return gather_full(self.tensor_shards(), self._world)

    @property
    def updates(self) -> int:
        """Number of updates so far, see `Engine.updates`."""
        return updates_of(self.optimizer)

    def moments(self) -> dict[str, TensorShard]:
        """Shards of the optimizer's moments, see `Engine.moments`."""
        if self._zero_stage == 0:
            return {name: shard_of(t, self._world) for name, t in full_moments(self.module, self.optimizer).items()}
        return self._partitioned_moments()

    @contextmanager
    def restore(self, updates: int) -> Iterator[dict[str, TensorShard]]:
        """Yield shards to fill, see `Engine.restore`."""
        weights = self.local_shards()
        begin_at(self.optimizer, self._optimized(), updates)
        if self._zero_stage == 0:
            yield weights | {name: as_full_shard(t) for name, t in full_moments(self.module, self.optimizer).items()}
            return
        yield weights | self._partitioned_moments()
        zero = self._engine.optimizer
        zero.refresh_fp32_params()
        if self._zero_stage == 3 and zero.persistent_parameters:
            persistent = zero.persistent_parameters
            persistent[0].partition(persistent)  # drops the full tensors, which hold the old values
            persistent[0].all_gather(persistent)

    def _optimized(self) -> list[Tensor]:
        """Tensors that the optimizer updates: flat groups of parameters, partitioned, in ZeRO stages 1 to 3."""
        if self._zero_stage == 0:
            return [*self._parameters.values()]
        zero = self._engine.optimizer
        return zero.fp32_partitioned_groups_flat if self._zero_stage == 3 else zero.single_partition_of_fp32_groups

    def _partitioned_moments(self) -> dict[str, TensorShard]:
        """Shards of the moments in ZeRO stages 1 to 3; empty before an update."""
        find = self._moment_of_zero_stage_3 if self._zero_stage == 3 else self._moment
        kinds = MOMENTS if self.updates else ()
        return {f"{kind}/{name}": find(p, kind) for name, p in self._parameters.items() for kind in kinds}

    def _moment(self, parameter: nn.Parameter, kind: str) -> TensorShard:
        """Shard of a moment in ZeRO stages 1 and 2, which partition a flat group: a rank may hold nothing of one."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return TensorShard(0, parameter.new_empty(0), parameter.shape)
        group = self._optimized()[mapping.param_group_index]
        place = mapping.hp_fragment_address
        values = self.optimizer.state[group][kind].narrow(0, place.start, place.numel)
        return TensorShard(mapping.lp_fragment_address.start, values, parameter.shape)

    def _moment_of_zero_stage_3(self, parameter: nn.Parameter, kind: str) -> TensorShard:
        values = safe_get_local_optimizer_state(parameter, kind)
        return Partition(values, parameter.ds_shape).tensor_shard(self._world)  # type: ignore[attr-defined]


def _zero_section(config: EngineConfig, world: World) -> dict[str, Any]:
    """Section `zero_optimization` of DeepSpeed's configuration."""
    on_gpu = world.device.type == "cuda"
    section: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": on_gpu and world.size > 1,
        "reduce_bucket_size": config.bucket_elements,
        "allgather_bucket_size": config.bucket_elements,
    }
    if config.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    limits = {
        "stage3_prefetch_bucket_size": config.bucket_elements,
        "stage3_param_persistence_threshold": config.persistence_threshold,
        "stage3_max_live_parameters": config.max_live_parameters,
        "stage3_max_reuse_distance": config.max_reuse_distance,
    }
    return section | {name: limit for name, limit in limits.items() if limit is not None}


def _partition(parameter: nn.Parameter) -> Partition | None:
    """Partition of a parameter on this rank in ZeRO stage 3; None in other stages."""
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
