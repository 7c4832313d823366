"""Weights as fragments: every engine's parts make up the whole, and are read by any other."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.gloo import Nursery
from support.parity import TORCH, ZERO
from torch import Tensor, nn

from vavae.distributed.config import EngineConfig, OptimizerConfig
from vavae.distributed.engine import Engine, build_engine
from vavae.distributed.fragments import fragments_of, load_fragments, save_fragments, whole
from vavae.distributed.world import World
from vavae.training.ema import ExponentialMovingAverage

pytestmark = pytest.mark.gloo

_DECAY, _STEPS = 0.75, 3


class Network(nn.Module):
    """Sizes that no number of ranks divides, one value alone, a frozen layer, and buffers of two types."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Linear(7, 1)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.frozen(self.norm(self.first(x)))).square().mean()


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network()


class Averaged(NamedTuple):
    """A few steps of an engine and its average."""

    trained: list[dict[str, Tensor]]
    """Weights before the first step and after each."""
    average: dict[str, Tensor]
    held: int
    """Values of the average on this rank."""


def engine_of(world: World, config: dict[str, Any], seed: int = 0) -> Engine:
    return build_engine(network(seed), OptimizerConfig(), EngineConfig(**config), "fp32", world, rounds=1, slice_size=4)


def average(world: World, config: dict[str, Any], folder: Path) -> Averaged:
    """Train, average, save the average."""
    engine = engine_of(world, config)
    ema, trained = ExponentialMovingAverage(engine, _DECAY, world), [engine.weights()]
    for step in range(_STEPS):
        engine.backward(engine.forward(torch.randn(4, 3, generator=torch.Generator().manual_seed(step))))
        engine.update(0.1)
        ema.update()
        trained.append(engine.weights())
    ema.save(folder)
    return Averaged(trained, ema.weights(), sum(len(part.values) for part in ema.fragments.values()))


def read(world: World, config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """The average that others have saved."""
    ema = ExponentialMovingAverage(engine_of(world, config, seed=1), _DECAY, world)
    ema.load(folder)
    return ema.weights()


@pytest.mark.parametrize(
    ("writers", "engine", "readers", "other"),
    [(3, ZERO[3], 2, TORCH), (3, TORCH, 2, ZERO[3]), (2, ZERO[1], 1, ZERO[3])],
)
def test_an_average_is_read_by_any_engine_on_any_number_of_ranks(
    gloo: Nursery, tmp_path: Path, writers: int, engine: dict[str, Any], readers: int, other: dict[str, Any]
) -> None:
    ranks = gloo.run(writers, average, engine, tmp_path)
    expected = ranks[0].trained[0]
    for weights in ranks[0].trained[1:]:
        expected = {
            name: torch.lerp(expected[name], tensor, 1 - _DECAY) if tensor.is_floating_point() else tensor
            for name, tensor in weights.items()
        }
    assert expected.keys() == network().state_dict().keys()
    torch.testing.assert_close(ranks[0].average, expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(ranks[0].trained[0]["first.weight"], ranks[0].trained[-1]["first.weight"])
    floats = sum(tensor.numel() for tensor in expected.values() if tensor.is_floating_point())
    assert sum(rank.held for rank in ranks) == floats, "each rank averages its own share"
    assert len(list(tmp_path.iterdir())) == writers
    for average_read in gloo.run(readers, read, other, tmp_path):
        for name, tensor in ranks[0].average.items():
            if tensor.is_floating_point():
                assert torch.equal(average_read[name], tensor), name


def save_and_load(world: World, config: dict[str, Any], folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights that were saved, and those of another beginning after they were loaded."""
    engine, other = engine_of(world, config), engine_of(world, config, seed=1)
    engine.backward(engine.forward(torch.randn(4, 3, generator=torch.Generator().manual_seed(world.rank))))
    engine.update(0.1)
    engine.save(folder)
    world.barrier()
    other.load(folder)
    return engine.weights(), other.weights()


@pytest.mark.parametrize("engine", [TORCH, *ZERO])
def test_a_checkpoint_holds_all_weights_frozen_or_not(gloo: Nursery, tmp_path: Path, engine: dict[str, Any]) -> None:
    for saved, loaded in gloo.run(2, save_and_load, engine, tmp_path):
        assert saved.keys() == loaded.keys()
        assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []


def shares(world: World) -> dict[str, tuple[int, int]]:
    return {name: (part.offset, len(part.values)) for name, part in fragments_of(network(), world).items()}


def test_parameters_are_dealt_in_runs_and_buffers_are_the_first_rank_s() -> None:
    first, last = shares(World(rank=0, size=3)), shares(World(rank=2, size=3))
    assert (first["first.bias"], last["first.bias"]) == ((0, 3), (6, 1))
    assert (first["last.bias"], last["last.bias"]) == ((0, 1), (1, 0))
    assert (first["norm.running_mean"], last["norm.running_mean"]) == ((0, 7), (7, 0))


def test_fragments_are_views() -> None:
    module = network()
    fragments_of(module, World())["first.weight"].values.fill_(3.0)
    assert (module.first.weight == 3).all()


def test_one_rank_holds_the_whole() -> None:
    module = network()
    state = whole(fragments_of(module, World()), World())
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in state.items())
    assert state["norm.num_batches_tracked"].dtype == torch.int64


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    for rank in range(2):
        save_fragments(fragments_of(network(), World(rank, 2)), tmp_path / str(rank))
    (tmp_path / "1").unlink()
    with pytest.raises(AssertionError, match=r"without all of first\.weight"):
        load_fragments(fragments_of(network(), World()), tmp_path)
