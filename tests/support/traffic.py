"""Counts of what `torch.distributed` is given in one step of the LightningDiT, for any engine."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from support.training_steps import BATCH, build_step, tiny_config
from torch import Tensor

from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import assign_lanes
from vavae.distributed.world import World

_WHOLE = {
    "all_reduce": "tensor",
    "reduce_scatter_tensor": "input",
    "all_gather_into_tensor": "output_tensor",
    "all_gather": "tensor_list",
}
"""Argument with all that is reduced or gathered, by collective."""
_PASSES = {"all_reduce": 2, "reduce_scatter_tensor": 1, "all_gather_into_tensor": 1, "all_gather": 1}
"""Times that a ring passes on what each collective is given, in units of (W - 1) / W."""
_FEW = 8
"""Most values of flags and norms, which are left out."""


def count_traffic(
    world: World, engines: Sequence[Mapping[str, Any]], muon: Mapping[str, Any] | None = None
) -> list[float]:
    """Bytes that leave a rank in a training step through a ring, for each configuration of an engine."""
    sent: list[float] = []
    for name in _WHOLE:
        # DeepSpeed keeps some of them when it joins the group.
        setattr(dist, name, partial(_counted, getattr(dist, name), sent))
    return [_count_step(world, engine, muon, sent) * (world.size - 1) / world.size for engine in engines]


def _counted(collective: Callable[..., Any], sent: list[float], *arguments: Any, **named: Any) -> Any:
    given = inspect.signature(collective).bind(*arguments, **named).arguments
    whole: Tensor | Sequence[Tensor] = given[_WHOLE[collective.__name__]]
    whole = whole if isinstance(whole, Tensor) else torch.stack([*whole])
    if whole.numel() > _FEW:
        sent.append(_PASSES[collective.__name__] * whole.numel() * whole.element_size())
    return collective(*arguments, **named)


def _count_step(world: World, engine: Mapping[str, Any], muon: Mapping[str, Any] | None, sent: list[float]) -> float:
    """Count the third step: ZeRO stage 3 learns the order of layers in the first."""
    config = tiny_config(engine=engine, ema_decay=None, optimizer={"muon": muon})
    step = build_step("train_lightningdit", config, world)
    lanes = assign_lanes(config.stream.lanes, world.rank, world.size)
    stream = load_micro_batches(step.source(), lanes, 0, workers=0)
    for number in range(3):
        sent.clear()
        step.run(next(stream), number * BATCH, 1e-3)
    return sum(sent)
