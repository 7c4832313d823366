"""Every engine on any number of ranks does what plain PyTorch does in one process."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from support.gloo import Nursery
from support.tiny import BATCH, JOBS, LANES, build_step, tiny_config
from torch import Tensor

import vavae.distributed.deepspeed_engine
import vavae.distributed.engine
from vavae.data.order import assign_lanes
from vavae.data.stream import load_slices
from vavae.distributed.world import World
from vavae.training.run import Job

pytestmark = pytest.mark.gloo

_STEPS = 4
_TORCH: dict[str, Any] = {"backend": "torch"}


class History(NamedTuple):
    """What a few steps of a training did."""

    terms: list[dict[str, float]]
    """Means over the global batch."""
    norms: list[Mapping[str, float]]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    """Parameters of all engines."""


def train_with_sgd(world: World, engine: dict[str, Any]) -> dict[Job, History]:
    """A few steps of both trainings, in which an error of a gradient is as large in the weights."""
    for module in (vavae.distributed.engine, vavae.distributed.deepspeed_engine):
        module.build_optimizer = lambda parameters, config: torch.optim.SGD(parameters, config.learning_rate)
    clipped = {"learning_rate": 0.05, "max_grad_norm": 1.0}
    return {job: _train(world, job, {"engine": engine, "optimizer": clipped}) for job in JOBS}


def train_with_adam(world: World, engine: dict[str, Any]) -> dict[Job, History]:
    """A few steps of both trainings with their own optimiser, unclipped."""
    free = {"learning_rate": 1e-3, "max_grad_norm": None}
    return {job: _train(world, job, {"engine": engine, "optimizer": free}) for job in JOBS}


def _train(world: World, job: Job, training: dict[str, Any]) -> History:
    step = build_step(job, tiny_config(**training), world)
    stream = load_slices(step.source(), assign_lanes(LANES, world.rank, world.size), 0, workers=0)
    before, terms, norms = _parameters(step.engines), [], []
    for number in range(_STEPS):
        falling_rate = training["optimizer"]["learning_rate"] / (1 + number)
        result = step.run(next(stream), number * BATCH, falling_rate)
        terms.append(world.sum_terms(result.terms))
        norms.append(dict(result.gradient_norms))
    return History(terms, norms, before, _parameters(step.engines))


def _parameters(engines: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        f"{engine}.{name}": parameter.detach().clone()
        for engine in engines
        for name, parameter in engines[engine].module.named_parameters()
    }


@pytest.fixture(scope="module")
def plain_sgd(gloo: Nursery) -> dict[Job, History]:
    return gloo.run(1, train_with_sgd, _TORCH)[0]


@pytest.fixture(scope="module")
def plain_adam(gloo: Nursery) -> dict[Job, History]:
    return gloo.run(1, train_with_adam, _TORCH)[0]


_CASES = [
    *((size, _TORCH) for size in (2, 3)),
    *((size, {"backend": "deepspeed", "zero_stage": stage}) for size in (1, 2) for stage in (0, 1, 2)),
    (3, {"backend": "deepspeed", "zero_stage": 2}),
]
"""Three ranks share four lanes in two rounds, so that two of the six slots are padding."""


@pytest.mark.parametrize(
    ("world_size", "engine"),
    _CASES,
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_any_engine_takes_the_steps_of_plain_pytorch(
    gloo: Nursery, plain_sgd: dict[Job, History], world_size: int, engine: dict[str, Any]
) -> None:
    ranks = gloo.run(world_size, train_with_sgd, engine)
    for job in JOBS:
        for rank in ranks:
            _assert_same_figures(rank[job], plain_sgd[job])
            assert _difference(rank[job].after, plain_sgd[job].after) < 1e-6
            assert _difference(rank[job].after, ranks[0][job].after) == 0


def test_a_process_on_its_own_needs_no_launcher(gloo: Nursery, plain_sgd: dict[Job, History]) -> None:
    history = gloo.run(1, train_with_sgd, {"backend": "deepspeed", "zero_stage": 1}, grouped=False)[0]
    for job in JOBS:
        _assert_same_figures(history[job], plain_sgd[job])


def test_the_steps_are_worth_comparing(plain_sgd: dict[Job, History]) -> None:
    """Every loss takes part, gradients are clipped, and every network moves by far more than the tolerance."""
    for history in plain_sgd.values():
        assert all(abs(value) > 1e-3 for value in history.terms[0].values()), history.terms[0]
        assert all(norm > 1.0 for norms in history.norms for norm in norms.values()), history.norms
        for engine in {name.partition(".")[0] for name in history.after}:
            assert _difference(_of(engine, history.before), _of(engine, history.after)) > 1e-3


@pytest.mark.parametrize("stage", [1, 2])
def test_adam_in_partitions_is_adam(gloo: Nursery, plain_adam: dict[Job, History], stage: int) -> None:
    history = gloo.run(2, train_with_adam, {"backend": "deepspeed", "zero_stage": stage})[0]
    for job in JOBS:
        _assert_same_figures(history[job], plain_adam[job])
    # Biases in front of a normalisation have no gradient but rounding, which Adam scales up to whole steps: those of
    # the autoencoder are left out, and the tolerance is a tenth of a step.
    for job, engine in (("train_vavae", "discriminator"), ("train_lightningdit", "lightningdit")):
        assert _difference(_of(engine, history[job].after), _of(engine, plain_adam[job].after)) < 1e-4


def meet_no_number(world: World) -> list[float]:
    """The gradient norm of each engine after a step in which only the last lane holds a value that is no number."""
    norms = []
    for engine in (_TORCH, *({"backend": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2))):
        step = build_step("train_lightningdit", tiny_config(engine=engine), world)
        slices = next(load_slices(step.source(), assign_lanes(LANES, world.rank, world.size), 0, workers=0))
        for item in slices:
            if item.lane == LANES - 1:
                item.mean.fill_(torch.nan)
        norms += step.run(slices, 0, 1e-3).gradient_norms.values()
    return norms


def test_all_ranks_learn_of_a_gradient_that_is_no_number(gloo: Nursery) -> None:
    for norms in gloo.run(2, meet_no_number):
        assert len(norms) == 4
        assert not any(map(math.isfinite, norms)), norms


def _assert_same_figures(history: History, plain: History) -> None:
    """Losses, adaptive weights and gradient norms of every step."""
    for ours, theirs in zip([*history.terms, *history.norms], [*plain.terms, *plain.norms], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def _difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def _of(engine: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in parameters.items() if name.startswith(f"{engine}.")}
