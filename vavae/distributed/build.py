"""Construction of the engine that a configuration asks for."""

import torch
from torch import nn

from vavae.distributed.config import EngineConfig, OptimizerConfig, Precision
from vavae.distributed.engine import Engine, TorchEngine
from vavae.distributed.world import World


def build_engine(
    module: nn.Module,
    optimizer: OptimizerConfig,
    config: EngineConfig,
    precision: Precision,
    world: World,
    accumulation_steps: int,
    micro_batch_size: int,
) -> Engine:
    """Build the engine that `config` names.

    Args:
        module: the module to train, in fp32; its initial weights are equal on all ranks.
        optimizer: configuration of the optimizer.
        config: backend and partitioning.
        precision: precision of the networks in the module's forward, and of those that it is handed.
        world: the ranks that train together.
        accumulation_steps: forward and backward passes per update on every rank.
        micro_batch_size: images of one accumulation step.
    """
    if precision == "bf16":
        # On the module, because DeepSpeed switches an autocast around its engine off, and its own would average
        # gradients in bf16. No cache: it would keep a second copy of all weights alive, full ones in ZeRO stage 3.
        module.forward = torch.autocast(world.device.type, torch.bfloat16, cache_enabled=False)(module.forward)
    if config.backend == "torch":
        return TorchEngine(module, optimizer, config, world, accumulation_steps)
    from vavae.distributed.deepspeed_engine import DeepSpeedEngine  # its import compiles and logs: only where used

    return DeepSpeedEngine(module, optimizer, config, world, accumulation_steps, micro_batch_size)
