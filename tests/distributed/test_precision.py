"""bf16: networks in half precision, everything else in single, under every engine."""

import math

import pytest
import torch
from support.engine_parity import TORCH, ZERO, Histories, Setup, error, train
from support.gloo import GlooLauncher
from support.training_steps import JOBS
from torch import Tensor, nn

from vavae.distributed.build import build_engine
from vavae.distributed.config import EngineConfig, OptimizerConfig
from vavae.distributed.world import World


class Probe(nn.Module):
    """One layer and the type of what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, torch.dtype]:
        y = self.layer(x)
        return y.float().square().mean(), y.dtype


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_layers_compute_in_the_precision_and_learn_in_single(precision: str, dtype: torch.dtype) -> None:
    engine = build_engine(Probe(), OptimizerConfig(), EngineConfig(**TORCH), precision, World(), 1, 1)
    loss, seen = engine.forward(torch.ones(2, 4))
    engine.backward(loss)
    assert seen == dtype
    assert loss.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in engine.module.parameters())
    assert not torch.is_autocast_enabled("cpu"), "nothing outside the forward is affected"


def bf16(engine: dict[str, object]) -> Setup:
    """Two ranks with one round each: gradients are added in the same order under every engine."""
    return Setup(engine, lanes=2, precision="bf16", steps=2)


@pytest.fixture(scope="module")
def plain(gloo: GlooLauncher) -> Histories:
    return gloo.run(2, train, bf16(TORCH))[0]


@pytest.mark.gloo
def test_both_trainings_go_roughly_as_in_single_precision(gloo: GlooLauncher, plain: Histories) -> None:
    for job, single in gloo.run(2, train, bf16(TORCH)._replace(precision="fp32"))[0].items():
        assert plain[job].figures[0] == pytest.approx(single.figures[0], rel=0.03, abs=0.01)
        for ours, theirs in zip(plain[job].figures, single.figures, strict=True):
            assert all(map(math.isfinite, ours.values()))
            losses = [name for name in theirs if name.startswith("loss/")]
            assert [ours[name] for name in losses] == pytest.approx([theirs[name] for name in losses], rel=0.05)
        assert plain[job].figures != single.figures
        assert all(parameter.dtype == torch.float32 for parameter in plain[job].after.values())


@pytest.mark.gloo
@pytest.mark.parametrize("stage", range(4))
def test_no_engine_changes_a_bit_of_it(gloo: GlooLauncher, plain: Histories, stage: int) -> None:
    did = gloo.run(2, train, bf16(ZERO[stage])._replace(recompute=stage == 3))[0]
    for name, parameter in plain["train_vavae"].after.items():
        assert error(did["train_vavae"].after[name], parameter) == 0
    for name, parameter in plain["train_lightningdit"].after.items():
        # DeepSpeed clips by a factor of its own rounding, which may round a weight to the next bfloat16.
        assert error(did["train_lightningdit"].after[name], parameter) < 1e-4


def exchanged(world: World) -> list[tuple[Histories, Histories]]:
    """The same steps with gradients that travel in single and in half precision, by engine."""
    engines = (TORCH, ZERO[0], ZERO[2], ZERO[3])
    setups = [Setup(engine, lanes=2, recompute=engine == ZERO[3], steps=2) for engine in engines]
    half = [setup._replace(engine={**setup.engine, "communication_data_type": "bf16"}) for setup in setups]
    return [(train(world, a), train(world, b)) for a, b in zip(setups, half, strict=True)]


def test_gradients_may_travel_in_half_precision(gloo: GlooLauncher) -> None:
    for single, half in gloo.run(2, exchanged)[0]:
        for job in JOBS:
            norms = [name for name in single[job].figures[0] if name.startswith("gradient_norm")]
            for name in norms:
                first, rounded = (histories[job].figures[0][name] for histories in (single, half))
                assert first != rounded == pytest.approx(first, rel=2**-8), (job, name)
