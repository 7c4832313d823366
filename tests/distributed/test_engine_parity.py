"""Every engine on any number of ranks does what plain PyTorch does in one process."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from support.gloo import Nursery
from support.tiny import BATCH, JOBS, LANES, build_step, tiny_config
from torch import Tensor, nn

import vavae.distributed.deepspeed_engine
import vavae.distributed.engine
from vavae.data.order import assign_lanes
from vavae.data.stream import ImageSlice, load_slices
from vavae.distributed.world import World
from vavae.training.config import RunConfig
from vavae.training.run import Job

pytestmark = pytest.mark.gloo

_SGD_STEPS, _ADAM_STEPS = 10, 5
_TORCH: dict[str, Any] = {"backend": "torch"}
_ZERO: list[dict[str, Any]] = [
    {"backend": "deepspeed", "zero_stage": stage, "persistence_threshold": 0} for stage in range(4)
]
"""By stage; without the threshold, stage 3 would leave so small a network whole."""


class Setup(NamedTuple):
    """What may differ between two runs of the same trainings."""

    engine: dict[str, Any]
    lanes: int = LANES
    recompute: bool = False
    """Checkpoint activations: the adaptive weights differentiate the recomputed graph several times."""
    smooth: bool = False
    """Networks, losses and images without kinks, on either side of which two engines may end up by rounding."""
    sgd: bool = True
    """An optimiser with which an error of a gradient is as large in the weights, instead of Adam."""


class History(NamedTuple):
    """What some steps of a training did."""

    figures: list[dict[str, float]]
    """Losses, adaptive weights and gradient norms of every step, means over the global batch."""
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    """Parameters of all engines."""
    drift: float
    """Largest difference of a parameter on this rank from the gathered one, where ranks hold whole ones."""


Histories = dict[Job, History]


def train(world: World, setup: Setup) -> Histories:
    """A few steps of both trainings."""
    if setup.sgd:
        for module in (vavae.distributed.engine, vavae.distributed.deepspeed_engine):
            module.build_optimizer = lambda parameters, config: torch.optim.SGD(parameters, config.learning_rate)
    return {job: _train(world, job, setup) for job in JOBS}


def _config(setup: Setup) -> RunConfig:
    rates = (1e-5, 1e-2, 5e-2) if setup.sgd else (1e-4, 1e-4, 1e-4)
    generator, discriminator = ({"learning_rate": rate, "max_grad_norm": None} for rate in rates[:2])
    config = tiny_config(
        engine=setup.engine,
        batch_size=BATCH // LANES * setup.lanes,
        # A LightningDiT begins with an infinite gradient, but for an epsilon: see the velocity direction loss.
        optimizer={"learning_rate": rates[2], "max_grad_norm": 1.0},
        train_vavae={"optimizer": generator, "discriminator_optimizer": discriminator},
    )
    alignment = {"distmat_weight": 0.0} if setup.smooth else {}
    vision_foundation = config.losses.vision_foundation.model_copy(update=alignment)
    # Adam makes whole steps of the rounding in the gradients of biases that a normalisation cancels: those in front of
    # one with as many groups as channels, which no network has that one would train.
    tokenizer = {"channels": 32 if setup.sgd else 64, "checkpoint_activations": setup.recompute}
    sections = {
        "stream": config.stream.model_copy(update={"lanes": setup.lanes}),
        "losses": config.losses.model_copy(update={"vision_foundation": vision_foundation}),
        "tokenizer": config.tokenizer.model_copy(update=tokenizer),
        "lightningdit": config.lightningdit.model_copy(update={"checkpoint_activations": setup.recompute}),
    }
    return config.model_copy(update=sections)


def _train(world: World, job: Job, setup: Setup) -> History:
    config = _config(setup)
    training = getattr(config, job)
    step = build_step(job, config, world)
    stream = load_slices(step.source(), assign_lanes(setup.lanes, world.rank, world.size), 0, workers=0)
    if setup.smooth:
        _smooth([*(engine.module for engine in step.engines.values()), getattr(step, "teacher", nn.Identity())])
    before, figures = _parameters(step.engines), []
    for number in range(_SGD_STEPS if setup.sgd else _ADAM_STEPS):
        slices = next(stream)
        for item in slices:
            if setup.smooth and isinstance(item, ImageSlice):
                item.images.copy_(255 * (item.images > 127))  # no reconstruction meets black or white
        result = step.run(slices, number * training.batch_size, training.optimizer.learning_rate / (1 + number))
        figures.append(world.sum_terms(result.terms) | dict(result.gradient_norms))
    after = _parameters(step.engines)
    here = {
        f"{engine}.{name}": parameter.detach()
        for engine in step.engines
        for name, parameter in step.engines[engine].module.named_parameters()
        if not hasattr(parameter, "ds_tensor")
    }
    return History(figures, before, after, max((_error(here[name], after[name]) for name in here), default=0.0))


def _smooth(networks: list[nn.Module]) -> None:
    for layer in [layer for network in networks for layer in network.modules()]:
        for name, child in layer.named_children():
            if isinstance(child, (nn.ReLU, nn.ReLU6, nn.LeakyReLU)):
                setattr(layer, name, nn.SiLU())


def _parameters(engines: Mapping[str, Any]) -> dict[str, Tensor]:
    whole = {name: engine.weights() for name, engine in engines.items()}
    return {
        f"{engine}.{name}": whole[engine][name]
        for engine in engines
        for name, _ in engines[engine].module.named_parameters()
    }


def _error(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def _difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(_error(ours[name], theirs[name]) for name in ours)


def _assert_same_figures(history: History, plain: History) -> None:
    for ours, theirs in zip(history.figures, plain.figures, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def _label(value: Any) -> str:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


@pytest.fixture(scope="module")
def plain(gloo: Nursery) -> Histories:
    """Plain PyTorch in one process."""
    return gloo.run(1, train, Setup(_TORCH, smooth=True))[0]


@pytest.fixture(scope="module", params=[1, 2])
def same_order(gloo: Nursery, request: pytest.FixtureRequest) -> tuple[int, int, Histories]:
    """Plain PyTorch on a rank that takes four rounds, and on two with one each: ranks, lanes, and what they did."""
    ranks, lanes = (1, LANES) if request.param == 1 else (2, 2)
    return ranks, lanes, gloo.run(ranks, train, Setup(_TORCH, lanes))[0]


@pytest.mark.parametrize("stage", range(4))
def test_no_bit_differs_where_gradients_are_added_in_the_same_order(
    gloo: Nursery, same_order: tuple[int, int, Histories], stage: int
) -> None:
    ranks, lanes, torch_did = same_order
    did = gloo.run(ranks, train, Setup(_ZERO[stage], lanes, recompute=stage == 3))[0]
    tokenizer = did["train_vavae"], torch_did["train_vavae"]
    assert _difference(tokenizer[0].after, tokenizer[1].after) == 0
    for ours, theirs in zip(tokenizer[0].figures, tokenizer[1].figures, strict=True):
        exact = [name for name in theirs if not name.startswith("gradient_norm")]
        assert [ours[name] for name in exact] == [theirs[name] for name in exact]
    # DeepSpeed clips by a factor of its own rounding.
    _assert_same_figures(did["train_lightningdit"], torch_did["train_lightningdit"])
    assert _difference(did["train_lightningdit"].after, torch_did["train_lightningdit"].after) < 1e-6


_CASES = [(2, _TORCH), (3, _TORCH), (2, _ZERO[2]), (2, _ZERO[3]), (3, _ZERO[3])]
"""Two ranks take the four lanes in two rounds, and so do three, with two of six slots as padding."""


@pytest.mark.parametrize(("world_size", "engine"), _CASES, ids=_label)
def test_any_engine_takes_the_steps_of_plain_pytorch(
    gloo: Nursery, plain: Histories, world_size: int, engine: dict[str, Any]
) -> None:
    recompute = engine.get("zero_stage") == 3 and world_size == 2
    for did in gloo.run(world_size, train, Setup(engine, recompute=recompute, smooth=True)):
        for job in JOBS:
            _assert_same_figures(did[job], plain[job])
            assert _difference(did[job].after, plain[job].after) < 1e-6
            assert did[job].drift == 0


def test_the_steps_are_worth_comparing(plain: Histories, same_order: tuple[int, int, Histories]) -> None:
    """Every loss takes part, what may be clipped is, and every network moves by far more than the tolerance."""
    for histories in (plain, same_order[2]):
        assert all(step["gradient_norm/lightningdit"] > 1.0 for step in histories["train_lightningdit"].figures)
        for history in histories.values():
            assert all(abs(value) > 1e-3 for value in history.figures[0].values()), history.figures[0]
            for engine in {name.partition(".")[0] for name in history.after}:
                moved = [_error(history.after[n], history.before[n]) for n in history.after if n.startswith(engine)]
                assert max(moved) > 1e-3


def test_a_process_on_its_own_needs_no_launcher(gloo: Nursery, plain: Histories) -> None:
    did = gloo.run(1, train, Setup(_ZERO[1], smooth=True), grouped=False)[0]
    for job in JOBS:
        _assert_same_figures(did[job], plain[job])


@pytest.fixture(scope="module")
def plain_adam(gloo: Nursery) -> Histories:
    """Plain PyTorch in one process, with the optimiser of both trainings."""
    return gloo.run(1, train, Setup(_TORCH, smooth=True, sgd=False))[0]


@pytest.mark.parametrize("stage", range(4))
def test_adam_in_partitions_is_adam(gloo: Nursery, plain_adam: Histories, stage: int) -> None:
    engine = {"backend": "deepspeed", "zero_stage": stage}  # without a threshold: some weights stay whole
    did = gloo.run(2, train, Setup(engine, smooth=True, sgd=False))[0]
    for job in JOBS:
        _assert_same_figures(did[job], plain_adam[job])
        # A constant that is added to all keys leaves the softmax as it is: the gradient of their biases is nothing but
        # rounding, which Adam scales up to whole steps.
        certain = [name for name in did[job].after if not name.endswith(".k.bias")]
        assert max(_error(did[job].after[name], plain_adam[job].after[name]) for name in certain) < 1e-6


def meet_no_number(world: World) -> list[float]:
    """The gradient norm of each engine after a step in which only the last lane holds a value that is no number."""
    norms = []
    for engine in (_TORCH, *_ZERO):
        step = build_step("train_lightningdit", tiny_config(engine=engine), world)
        slices = next(load_slices(step.source(), assign_lanes(LANES, world.rank, world.size), 0, workers=0))
        for item in slices:
            if item.lane == LANES - 1:
                item.mean.fill_(torch.nan)
        norms += step.run(slices, 0, 1e-3).gradient_norms.values()
    return norms


def test_all_ranks_learn_of_a_gradient_that_is_no_number(gloo: Nursery) -> None:
    for norms in gloo.run(2, meet_no_number):
        assert len(norms) == 1 + len(_ZERO)
        assert not any(map(math.isfinite, norms)), norms
