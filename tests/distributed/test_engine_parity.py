"""Every engine on any number of ranks does what plain PyTorch does in one process."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
from support.engine_parity import OFFLOADED, TORCH, ZERO, Histories, History, Setup, error, train, train_job
from support.gloo import GlooLauncher
from support.training_steps import JOBS, LANES, build_step, tiny_config
from torch import Tensor

from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import assign_lanes
from vavae.distributed.deepspeed_engine import DeepSpeedEngine
from vavae.distributed.engine import MOMENTS
from vavae.distributed.world import World
from vavae.runs.jobs import Job
from vavae.training.step import Step

pytestmark = pytest.mark.gloo

_FEW_LANES = 2


def _difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(error(ours[name], theirs[name]) for name in ours)


def _assert_same_figures(history: History, plain: History) -> None:
    for ours, theirs in zip(history.figures, plain.figures, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def _label(value: Any) -> str:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


@pytest.fixture(scope="module")
def plain(gloo: GlooLauncher) -> Histories:
    """Plain PyTorch in one process."""
    return gloo.run(1, train, Setup(TORCH, smooth=True))[0]


@pytest.fixture(scope="module", params=[1, 2])
def same_order(gloo: GlooLauncher, request: pytest.FixtureRequest) -> tuple[int, Histories]:
    """Plain PyTorch on one rank that takes two rounds, and on two with one each: ranks, and what they did."""
    return request.param, gloo.run(request.param, train, Setup(TORCH, _FEW_LANES))[0]


@pytest.mark.parametrize("stage", range(4))
def test_no_bit_differs_where_gradients_are_added_in_the_same_order(
    gloo: GlooLauncher, same_order: tuple[int, Histories], stage: int
) -> None:
    ranks, torch_did = same_order
    did = gloo.run(ranks, train, Setup(ZERO[stage], _FEW_LANES, recompute=stage == 3))[0]
    tokenizer = did["train_vavae"], torch_did["train_vavae"]
    assert _difference(tokenizer[0].after, tokenizer[1].after) == 0
    for ours, theirs in zip(tokenizer[0].figures, tokenizer[1].figures, strict=True):
        exact = [name for name in theirs if not name.startswith("gradient_norm")]
        assert [ours[name] for name in exact] == [theirs[name] for name in exact]
    # DeepSpeed clips by a factor of its own rounding.
    _assert_same_figures(did["train_lightningdit"], torch_did["train_lightningdit"])
    assert _difference(did["train_lightningdit"].after, torch_did["train_lightningdit"].after) < 1e-6


_CASES = [(2, TORCH), (3, TORCH), (2, ZERO[2]), (2, ZERO[3]), (3, ZERO[2])]
"""Two ranks take the four lanes in two rounds, and so do three, with two of six slots as padding."""


@pytest.mark.parametrize(("world_size", "engine"), _CASES, ids=_label)
def test_any_engine_takes_the_steps_of_plain_pytorch(
    gloo: GlooLauncher, plain: Histories, world_size: int, engine: dict[str, Any]
) -> None:
    recompute = engine.get("zero_stage") == 3
    for did in gloo.run(world_size, train, Setup(engine, recompute=recompute, smooth=True)):
        for job in JOBS:
            _assert_same_figures(did[job], plain[job])
            assert _difference(did[job].after, plain[job].after) < 1e-6
            assert did[job].drift == 0


def test_the_steps_are_worth_comparing(plain: Histories, same_order: tuple[int, Histories]) -> None:
    """Every loss takes part, what may be clipped is, and every network moves by far more than the tolerance."""
    for histories in (plain, same_order[1]):
        assert all(step["gradient_norm/lightningdit"] > 1.0 for step in histories["train_lightningdit"].figures)
        for history in histories.values():
            assert all(abs(value) > 1e-3 for value in history.figures[0].values()), history.figures[0]
            for engine in {name.partition(".")[0] for name in history.after}:
                moved = [error(history.after[n], history.before[n]) for n in history.after if n.startswith(engine)]
                assert max(moved) > 1e-3


def test_a_process_on_its_own_needs_no_launcher(gloo: GlooLauncher, plain: Histories) -> None:
    did = gloo.run(1, train, Setup(ZERO[1], smooth=True), grouped=False)[0]
    for job in JOBS:
        _assert_same_figures(did[job], plain[job])


@pytest.fixture(scope="module")
def plain_adam(gloo: GlooLauncher) -> Histories:
    """Plain PyTorch in one process, with the optimizer of both trainings."""
    return gloo.run(1, train, Setup(TORCH, smooth=True, sgd=False, steps=5))[0]


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
)
def test_adam_in_partitions_is_adam(gloo: GlooLauncher, plain_adam: Histories, stage: int, offload: bool) -> None:
    # Without a threshold: some weights stay whole.
    engine = {"backend": "deepspeed", "zero_stage": stage, "offload_optimizer": offload}
    did = gloo.run(2, train, Setup(engine, smooth=True, sgd=False, steps=5))[0]
    for job in JOBS:
        _assert_same_figures(did[job], plain_adam[job])
        # A constant that is added to all keys leaves the softmax as it is: the gradient of their biases is nothing but
        # rounding, which Adam scales up to whole steps.
        certain = [name for name in did[job].after if not name.endswith(".k.bias")]
        assert max(error(did[job].after[name], plain_adam[job].after[name]) for name in certain) < 1e-6


def train_by_muon(world: World, job: Job, engines: list[dict[str, Any]]) -> list[History]:
    """A few steps of a training in each engine, with Muon for all weights that have rows and columns."""
    muon = {"matrices": ["*"], "others": [], "precision": "fp32"}
    setups = [Setup(engine, smooth=True, sgd=False, steps=3, muon=muon) for engine in engines]
    return [train_job(world, job, setup) for setup in setups]


@pytest.mark.parametrize(("job", "most_ranks"), [("train_lightningdit", 3), ("train_vavae", 2)])
def test_muon_on_any_number_of_ranks_is_muon(gloo: GlooLauncher, job: Job, most_ranks: int) -> None:
    in_small_buckets = {**TORCH, "bucket_elements": 5000}
    plain, *others = gloo.run(1, train_by_muon, job, [TORCH, ZERO[0]] if most_ranks > 2 else [TORCH])[0]
    for ranks in range(2, most_ranks + 1):
        engines = [in_small_buckets, ZERO[0]] if most_ranks > 2 else [in_small_buckets]
        others += [history for of_rank in gloo.run(ranks, train_by_muon, job, engines) for history in of_rank]
    for did in others:
        _assert_same_figures(did, plain)
        certain = [name for name in did.after if not name.endswith(".k.bias")]
        assert max(error(did.after[name], plain.after[name]) for name in certain) < 1e-6
        assert did.drift == 0
    assert _difference(plain.after, plain.before) > 1e-4


def moment_bytes(world: World) -> list[int]:
    """Bytes of the LightningDiT's moments that this rank holds after a step, by ZeRO stage."""
    return [_moment_bytes(world, engine) for engine in ZERO]


def _moment_bytes(world: World, config: dict[str, Any]) -> int:
    step = build_step("train_lightningdit", tiny_config(engine=config), world)
    micro_batches = next(load_micro_batches(step.source(), assign_lanes(LANES, world.rank, world.size), 0, workers=0))
    step.run(micro_batches, 0, 1e-3)
    (engine,) = step.engines.values()
    assert isinstance(engine, DeepSpeedEngine)
    return sum(
        value.nbytes for state in engine.optimizer.state.values() for name, value in state.items() if name in MOMENTS
    )


def test_a_rank_keeps_its_share_of_the_optimizer(gloo: GlooLauncher) -> None:
    alone = gloo.run(1, moment_bytes)[0]
    for world_size in (2, 4):
        for rank in gloo.run(world_size, moment_bytes):
            assert rank[0] == alone[0], "stage 0 divides nothing"
            assert rank[1:] == pytest.approx([held / world_size for held in alone[1:]], rel=0.01)


class Met(NamedTuple):
    """Outcome of three steps, in the second of which the last rank's loss is no number."""

    norms: dict[str, list[float]]
    """Gradient norms of the three steps, by engine."""
    untouched: dict[str, bool]
    """By engine, true where the second step changed no weight and no buffer, and both others did."""
    updates: dict[str, list[int]]
    average_follows: bool
    """True where the average, updated on, comes to the weights as they are after the steps."""


def meet_no_number(world: World, job: Job) -> list[Met]:
    """By engine."""
    return [_meet_no_number(world, job, engine) for engine in (TORCH, *ZERO, *OFFLOADED)]


def _weights(step: Step, world: World) -> dict[str, dict[str, Tensor]]:
    """Full weights by engine, on every rank."""
    return {name: world.broadcast(engine.weights()) for name, engine in step.engines.items()}


def _meet_no_number(world: World, job: Job, config: dict[str, Any]) -> Met:
    training = {"discriminator_optimizer": {"learning_rate": 1e-3}}
    losses = {"adversarial": {"start_images": 0, "channels": 32, "layers": 2, "norm": "batch"}}
    step = build_step(job, tiny_config(engine=config, train_vavae=training, losses=losses), world)
    micro_batches = next(load_micro_batches(step.source(), assign_lanes(LANES, world.rank, world.size), 0, workers=0))
    average, (engine, *_) = step.ema, step.engines.values()
    backward, bad = engine.backward, math.nan if world.rank == world.size - 1 else 1.0
    results, updates, states = [], [], [_weights(step, world)]
    for factor in (1.0, bad, 1.0):
        engine.backward = lambda loss, factor=factor: backward(loss * factor)  # type: ignore[method-assign]
        results.append(step.run(micro_batches, 0, 1e-3).gradient_norms)
        states.append(_weights(step, world))
        updates.append({name: engine.updates for name, engine in step.engines.items()})
    untouched = {
        name: _difference(states[2][name], states[1][name])
        == 0
        < min(_difference(states[1][name], states[0][name]), _difference(states[3][name], states[2][name]))
        for name in step.engines
    }
    assert average is not None
    for _ in range(200):
        average.update()
    present = engine.tensor_shards()
    parts = [(part.values, present[name].values) for name, part in average.tensor_shards.items() if len(part.values)]
    follows = max(error(ours, theirs) for ours, theirs in parts)
    return Met(
        {name: [result[f"gradient_norm/{name}"].item() for result in results] for name in step.engines},
        untouched,
        {name: [counts[name] for counts in updates] for name in step.engines},
        follows < 1e-6,
    )


@pytest.mark.parametrize("job", JOBS)
def test_all_ranks_learn_of_a_gradient_that_is_no_number_and_none_applies_it(gloo: GlooLauncher, job: Job) -> None:
    for rank in gloo.run(2, meet_no_number, job):
        for met in rank:
            for name, norms in met.norms.items():
                assert [*map(math.isfinite, norms)] == [True, False, True], name
                assert met.untouched[name], name
                assert met.updates[name] == [1, 1, 2], name
            assert met.average_follows
