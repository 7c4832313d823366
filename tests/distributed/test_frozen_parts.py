"""Parts that do not learn, under every engine."""

from typing import Any

import pytest
import torch
from support.gloo import GlooLauncher
from support.training_steps import BATCH, LANES, DrawnImages, tiny_config
from torch import Tensor

import vavae.distributed.deepspeed_engine
import vavae.distributed.engine
from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import assign_lanes
from vavae.distributed.world import World
from vavae.training.step import StepWeights
from vavae.training.tokenizer_step import TokenizerStep

pytestmark = pytest.mark.gloo

_TORCH: dict[str, Any] = {"backend": "torch"}
_STAGES = [
    {"from_images": BATCH, "frozen": ["projection"]},
    {"from_images": 2 * BATCH, "frozen": ["encoder"], "losses": {"vision_foundation": {"weight": 0}}},
    {
        "from_images": 3 * BATCH,
        "frozen": [],
        "losses": {"vision_foundation": {"weight": 0.1}, "adversarial": {"weight": 0}},
    },
]


def train_in_stages(world: World, engine: dict[str, Any]) -> list[dict[str, Tensor]]:
    """One step in each of four stages, the last without an adversary.

    Returns:
        The generator's weights and average, and the adversary's weights, after each.
    """
    for module in (vavae.distributed.engine, vavae.distributed.deepspeed_engine):
        module.build_optimizer = lambda parameters, config, *_: torch.optim.SGD(
            [*parameters.values()], config.learning_rate, fused=True
        )
    config = tiny_config({"images": 4 * BATCH, "stages": _STAGES}, engine=engine)
    accumulation_steps = assign_lanes(LANES, world.rank, world.size)
    start: StepWeights | None = None
    micro_batches, seen = load_micro_batches(DrawnImages(), accumulation_steps, 0, workers=0), []  # type: ignore[type-var]
    for stage in config.tokenizer_phases():
        step = TokenizerStep(config, stage, start, DrawnImages(), world)  # type: ignore[arg-type]
        step.run(next(micro_batches), stage.from_images, 1e-3)
        assert step.ema is not None
        step.ema.update()
        start = step.weights()
        states = {"average": step.ema.weights(), **{name: engine.weights() for name, engine in step.engines.items()}}
        seen.append({f"{part}.{name}": tensor for part, state in states.items() for name, tensor in state.items()})
    return seen


@pytest.fixture(scope="module")
def plain(gloo: GlooLauncher) -> list[dict[str, Tensor]]:
    return gloo.run(1, train_in_stages, _TORCH)[0]


def _moved(before: dict[str, Tensor], after: dict[str, Tensor], prefix: str) -> set[str]:
    return {name for name in before if name.startswith(prefix) and not torch.equal(before[name], after[name])}


def test_a_frozen_part_stays_and_the_rest_goes_on(plain: list[dict[str, Tensor]]) -> None:
    first, second, third, fourth = plain
    projection = "generator.alignment.projection.weight"
    assert projection not in _moved(first, second, "generator.")
    assert _moved(first, second, "generator.autoencoder.encoder")
    assert not _moved(second, third, "generator.autoencoder.encoder")
    assert not _moved(second, third, "generator.autoencoder.quant_conv")
    assert _moved(second, third, "generator.autoencoder.decoder")
    assert _moved(second, third, "discriminator.")
    assert not _moved(third, fourth, "discriminator.")
    assert _moved(third, fourth, "generator.autoencoder.encoder")


@pytest.mark.parametrize(
    ("world_size", "engine"),
    [
        (2, _TORCH),
        *((2, {"backend": "deepspeed", "zero_stage": stage}) for stage in (0, 1, 2)),
        (2, {"backend": "deepspeed", "zero_stage": 3, "persistence_threshold": 0}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_every_engine_does_the_same(
    gloo: GlooLauncher, plain: list[dict[str, Tensor]], world_size: int, engine: dict[str, Any]
) -> None:
    for ours, theirs in zip(gloo.run(world_size, train_in_stages, engine)[0], plain, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if "running_" in name or "num_batches" in name:
                continue  # of the first rank's micro-batches alone, and never used
            assert (ours[name].double() - theirs[name].double()).abs().max() < 1e-6, name
