"""The plain engine in one process, in closed form."""

import pytest
import torch
from torch import nn

from vavae.distributed.config import EngineConfig, OptimizerConfig
from vavae.distributed.engine import TorchEngine
from vavae.distributed.world import World


def _engine(accumulation_steps: int = 1, **optimizer: float) -> TorchEngine:
    """Two numbers, both one."""
    module = nn.ParameterDict({"used": torch.ones(()), "unused": torch.ones(())})
    return TorchEngine(module, OptimizerConfig(**optimizer), EngineConfig(), World(), accumulation_steps)


def test_a_step_is_the_mean_of_its_rounds() -> None:
    engine = _engine(accumulation_steps=2)
    for factor in (1.0, 5.0):
        engine.backward(factor * engine.module["used"])
    assert engine.update(0.0) == pytest.approx(3.0)
    for _ in range(2):
        engine.backward(engine.module["used"] * 2.0)
    assert engine.update(0.0) == pytest.approx(2.0), "an update starts the next step from nothing"


@pytest.mark.parametrize("limit", [None, 1.0])
def test_the_norm_is_that_before_clipping(limit: float | None) -> None:
    engine = _engine(max_grad_norm=limit)
    engine.backward(7.0 * engine.module["used"])
    assert engine.update(0.0) == pytest.approx(7.0)


def test_weights_that_no_loss_reached_still_decay() -> None:
    engine = _engine(weight_decay=0.5)
    engine.backward(engine.module["used"] * 0.0)
    engine.update(0.1)
    for name in ("used", "unused"):
        assert engine.module[name].item() == pytest.approx(1 - 0.1 * 0.5)
