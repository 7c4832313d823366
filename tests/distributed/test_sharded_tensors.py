"""Weights as saved_shards: every engine's parts make up the whole, and are read by any other."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from support.engine_parity import TORCH, ZERO
from support.gloo import GlooLauncher
from torch import Tensor, nn

from vavae.distributed import sharded_tensors
from vavae.distributed.build import build_engine
from vavae.distributed.config import EngineConfig, MuonConfig, OptimizerConfig
from vavae.distributed.engine import Engine
from vavae.distributed.shard_files import (
    DamagedFileError,
    ShardFile,
    fetch_tensor_shards,
    fill_tensor_shards,
    header_of,
    load_tensor_shards,
    map_file,
    save_tensor_shards,
)
from vavae.distributed.sharded_tensors import copy_shards, gather_full, tensor_shards_of
from vavae.distributed.world import World
from vavae.training.ema import ExponentialMovingAverage

pytestmark = pytest.mark.gloo

_DECAY, _STEPS = 0.75, 3
_ADAM = OptimizerConfig()


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


def engine_of(world: World, config: dict[str, Any], seed: int = 0, optimizer: OptimizerConfig = _ADAM) -> Engine:
    return build_engine(
        network(seed),
        optimizer,
        EngineConfig(**config),
        "fp32",
        world,
        accumulation_steps=1,
        micro_batch_size=4,
    )


def average(world: World, config: dict[str, Any], folder: Path) -> Averaged:
    """Train, average, save the average."""
    engine = engine_of(world, config)
    ema, trained = ExponentialMovingAverage(engine, _DECAY, world), [engine.weights()]
    for step in range(_STEPS):
        engine.backward(engine.forward(torch.randn(4, 3, generator=torch.Generator().manual_seed(step))))
        engine.update(0.1)
        ema.update()
        trained.append(engine.weights())
    save_tensor_shards(ema.tensor_shards, folder / str(world.rank))
    return Averaged(trained, ema.weights(), sum(len(part.values) for part in ema.tensor_shards.values()))


def read(world: World, config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """The average that others have saved."""
    ema = ExponentialMovingAverage(engine_of(world, config, seed=1), _DECAY, world)
    load_tensor_shards(ema.tensor_shards, folder.iterdir())
    return ema.weights()


@pytest.mark.parametrize(
    ("writers", "engine", "readers", "other"),
    [(3, ZERO[3], 2, TORCH), (3, TORCH, 2, ZERO[3]), (2, ZERO[1], 1, ZERO[3])],
)
def test_an_average_is_read_by_any_engine_on_any_number_of_ranks(
    gloo: GlooLauncher, tmp_path: Path, writers: int, engine: dict[str, Any], readers: int, other: dict[str, Any]
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
    average_read, *elsewhere = gloo.run(readers, read, other, tmp_path)
    assert not any(elsewhere), "rank 0 alone holds the whole"
    for name, tensor in ranks[0].average.items():
        if tensor.is_floating_point():
            assert torch.equal(average_read[name], tensor), name


def state_of(engine: Engine, world: World) -> dict[str, Tensor]:
    """Weights and moments, whole."""
    return gather_full({**engine.tensor_shards(), **engine.moments()}, world)


def take_a_step(engine: Engine, seed: int) -> None:
    # The same on every rank, so that their number makes no difference.
    engine.backward(engine.forward(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))))
    engine.update(0.1)


def save_state(
    world: World, config: dict[str, Any], folder: Path, steps: int, optimizer: OptimizerConfig = _ADAM
) -> list[dict[str, Tensor]]:
    """The state that is saved after some steps, and the one after a further step."""
    engine = engine_of(world, config, optimizer=optimizer)
    for seed in range(steps):
        take_a_step(engine, seed)
    save_tensor_shards({**engine.tensor_shards(), **engine.moments()}, folder / f"{world.rank}.safetensors")
    assert engine.updates == steps
    saved = state_of(engine, world)
    take_a_step(engine, steps)
    return [saved, state_of(engine, world)]


def load_state(
    world: World,
    config: dict[str, Any],
    folder: Path,
    steps: int,
    stray: int,
    optimizer: OptimizerConfig = _ADAM,
) -> list[dict[str, Tensor]]:
    """The state that is loaded by an engine that may have gone elsewhere before, and the one after a further step."""
    engine = engine_of(world, config, seed=1, optimizer=optimizer)
    for seed in range(stray):
        take_a_step(engine, 100 + seed)
    with engine.restore(steps) as parts:
        load_tensor_shards(parts, sorted(folder.iterdir()))
    assert engine.updates == steps
    loaded = state_of(engine, world)
    take_a_step(engine, steps)
    return [loaded, state_of(engine, world)]


_AS_DELIVERED = {"backend": "deepspeed", "zero_stage": 3}
"""With DeepSpeed's own threshold: tensors as small as these are divided, and yet whole on every rank."""


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("writers", "engine", "readers", "other"),
    [
        *((2, engine, 2, engine) for engine in (TORCH, *ZERO, _AS_DELIVERED)),
        (2, ZERO[1], 3, ZERO[3]),
        (3, ZERO[3], 1, ZERO[2]),
        (2, ZERO[2], 4, ZERO[1]),
        (1, TORCH, 3, _AS_DELIVERED),
        (3, _AS_DELIVERED, 2, ZERO[0]),
        (2, ZERO[0], 1, TORCH),
    ],
)
def test_the_state_of_any_engine_is_read_by_any_other(
    gloo: GlooLauncher,
    tmp_path: Path,
    writers: int,
    engine: dict[str, Any],
    readers: int,
    other: dict[str, Any],
    steps: int,
) -> None:
    saved, after = gloo.run(writers, save_state, engine, tmp_path, steps)[0]
    assert any(name.startswith("exp_avg_sq/") for name in saved) == (steps > 0)
    same = (writers, engine) == (readers, other)
    (loaded, resumed), *elsewhere = gloo.run(readers, load_state, other, tmp_path, steps, 0 if same else 2)
    assert not any(map(any, elsewhere)), "rank 0 alone holds the whole"
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
    torch.testing.assert_close(resumed, after, rtol=0, atol=0 if same else 1e-6)


@pytest.mark.parametrize(
    ("writers", "engine", "readers", "other"),
    [(2, TORCH, 2, TORCH), (1, ZERO[0], 1, ZERO[0]), (2, TORCH, 3, ZERO[0]), (3, ZERO[0], 1, TORCH)],
)
def test_the_momentum_of_muon_is_read_by_any_number_of_ranks(
    gloo: GlooLauncher, tmp_path: Path, writers: int, engine: dict[str, Any], readers: int, other: dict[str, Any]
) -> None:
    optimizer = OptimizerConfig(muon=MuonConfig(matrices=("first.*",), others=("last.*",)))
    saved, after = gloo.run(writers, save_state, engine, tmp_path, 2, optimizer)[0]
    moments = {name: tensor for name, tensor in saved.items() if "/" in name}
    assert [name for name in moments if name.endswith("/first.weight")] == ["momentum_buffer/first.weight"]
    assert all(tensor.abs().max() > 0 for name, tensor in moments.items() if not name.endswith("first.bias"))
    same = (writers, engine) == (readers, other)
    (loaded, resumed), *_ = gloo.run(readers, load_state, other, tmp_path, 2, 0 if same else 2, optimizer)
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
    torch.testing.assert_close(resumed, after, rtol=0, atol=0 if same else 1e-6)


class Gathered(NamedTuple):
    """Weights and moments of an engine as they are gathered on a rank."""

    full: dict[str, Tensor]
    expected: dict[str, Tensor]
    """By one reduction of each whole tensor."""
    own: int
    """Bytes of this rank's shards."""
    sent: int
    """Bytes that this rank sends to gather all."""


def gather_counted(world: World, config: dict[str, Any]) -> Gathered:
    """Train for a step, and gather in buckets of a few values."""
    engine = engine_of(world, config)
    take_a_step(engine, 0)
    parts = {**engine.tensor_shards(), **engine.moments()}
    expected = {}
    for name, part in parts.items():
        flat = torch.zeros(part.shape.numel(), dtype=part.values.dtype)
        flat[part.offset : part.offset + len(part.values)] = part.values
        expected[name] = world.sum(flat).view(part.shape)
    sent, gather = [], dist.gather

    def counted(values: Tensor, gathered: list[Tensor] | None) -> None:
        sent.append(0 if world.is_first else values.nbytes)
        gather(values, gathered)

    def refused(*arguments: Any) -> None:
        raise AssertionError("reduced in whole")

    dist.gather, dist.all_reduce, sharded_tensors._BUCKET_BYTES = counted, refused, 150
    return Gathered(gather_full(parts, world), expected, sum(part.values.nbytes for part in parts.values()), sum(sent))


@pytest.mark.parametrize(
    ("world_size", "engine"), [(1, TORCH), *((2, engine) for engine in (TORCH, *ZERO, _AS_DELIVERED)), (3, ZERO[3])]
)
def test_rank_0_alone_gathers_the_whole(gloo: GlooLauncher, world_size: int, engine: dict[str, Any]) -> None:
    first, *others = gloo.run(world_size, gather_counted, engine)
    assert first.full.keys() == first.expected.keys()
    for name, tensor in first.expected.items():
        assert first.full[name].dtype == tensor.dtype, name
        assert first.full[name].equal(tensor), name
    assert first.sent == 0
    assert not any(rank.full for rank in others)
    if world_size == 2:
        assert others[0].sent == others[0].own, "each shard travels once, and what rank 0 has does not"


def shares(world: World) -> dict[str, tuple[int, int]]:
    return {name: (part.offset, len(part.values)) for name, part in tensor_shards_of(network(), world).items()}


def test_parameters_are_dealt_in_runs_and_buffers_are_the_first_rank_s() -> None:
    first, last = shares(World(rank=0, size=3)), shares(World(rank=2, size=3))
    assert (first["first.bias"], last["first.bias"]) == ((0, 3), (6, 1))
    assert (first["last.bias"], last["last.bias"]) == ((0, 1), (1, 0))
    assert (first["norm.running_mean"], last["norm.running_mean"]) == ((0, 7), (0, 0))


def test_fragments_are_views() -> None:
    module = network()
    tensor_shards_of(module, World())["first.weight"].values.fill_(3.0)
    assert (module.first.weight == 3).all()


def test_shards_are_filled_from_any_that_hold_their_ranges() -> None:
    given, filled = network(0), network(1)
    left = filled.last.weight.clone()
    whole = {name: part for name, part in tensor_shards_of(given, World()).items() if name != "last.weight"}
    target = tensor_shards_of(filled, World(1, 3))
    copy_shards(whole, target)
    for name, part in tensor_shards_of(given, World(1, 3)).items():
        assert target[name].values.equal(part.values) == (name != "last.weight"), name
    assert filled.last.weight.equal(left)
    assert not filled.first.weight.equal(given.first.weight), "the ranges of other ranks stay"
    with pytest.raises(AssertionError, match=r"first\.weight: of another module"):
        copy_shards({"first.weight": whole["first.bias"]}, target)


def test_one_rank_holds_the_whole() -> None:
    module = network()
    state = gather_full(tensor_shards_of(module, World()), World())
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in state.items())
    assert state["norm.num_batches_tracked"].dtype == torch.int64


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    for rank in range(2):
        save_tensor_shards(tensor_shards_of(network(), World(rank, 2)), tmp_path / str(rank))
    (tmp_path / "1").unlink()
    with pytest.raises(AssertionError, match=r"without all of first\.weight"):
        load_tensor_shards(tensor_shards_of(network(), World()), tmp_path.iterdir())


def test_a_rank_reads_no_more_than_overlaps_its_own(tmp_path: Path) -> None:
    """One of two ranks leaves out what lies in the first of four ranks' files, and reads the others in few pieces."""
    module, parts = network(), tensor_shards_of(network(), World(1, 2))
    for rank in range(4):
        save_tensor_shards(tensor_shards_of(module, World(rank, 4)), tmp_path / str(rank))
    read: dict[int, list[tuple[int, int]]] = {}

    def opened(rank: int) -> ShardFile:
        mapped = map_file(tmp_path / str(rank))

        def counted(start: int, stop: int) -> memoryview:
            read.setdefault(rank, []).append((start, stop))
            return memoryview(mapped(start, stop))

        return ShardFile(str(rank), header_of(tmp_path / str(rank)), counted)

    saved_shards = fetch_tensor_shards(parts, map(opened, (2, 3, 0, 1)))
    fill_tensor_shards(parts, saved_shards)
    for name, part in tensor_shards_of(module, World(1, 2)).items():
        assert parts[name].values.equal(part.values), name
    assert 0 not in read, "but for what a rank of two has of tensors of few values, two files would do"
    assert max(map(len, read.values())) <= 2, "what lies together is read at once"


def test_a_flipped_byte_is_noticed_where_it_is_read(tmp_path: Path) -> None:
    save_tensor_shards(tensor_shards_of(network(), World()), tmp_path / "0")
    data = bytearray((tmp_path / "0").read_bytes())
    data[-1] ^= 1
    (tmp_path / "0").write_bytes(data)
    parts = tensor_shards_of(network(), World())
    before = {name: part.values.clone() for name, part in parts.items()}
    with pytest.raises(DamagedFileError, match=r"the SHA-256 of .* is another"):
        load_tensor_shards(parts, [tmp_path / "0"])
    assert all(part.values.equal(before[name]) for name, part in parts.items())
