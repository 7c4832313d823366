"""Recipes beyond the paper with every engine, and a training that goes on to the same bits."""

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.engine_parity import TORCH, ZERO
from support.gloo import GlooLauncher
from support.recipes import APART, OPTIONS, RECIPES, recipe_config
from support.training_steps import LANES, build_step, figures_of
from torch import Tensor

from vavae.data.image_stream import MicroBatchKey
from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import assign_lanes
from vavae.distributed.world import World
from vavae.storage.storage import Storage
from vavae.training.checkpoints.checkpoint import Checkpoints
from vavae.training.checkpoints.retention import Retention
from vavae.training.checkpoints.state import TrainState
from vavae.training.diffusion_step import DiffusionStep
from vavae.training.step import Step

STEPS = 4
ENGINES = [TORCH, *ZERO]


def engines_of(recipe: str) -> list[dict[str, Any]]:
    """Engines that train a recipe: but for average velocities all of them."""
    return ENGINES[:-1] if recipe.endswith("average velocities") else ENGINES


def take(step: Step, world: World, numbers: range) -> list[dict[str, float]]:
    """Figures of some steps."""
    stream = load_micro_batches(step.source(), assign_lanes(LANES, world.rank, world.size), numbers.start, workers=0)
    return [figures_of(step.run(next(stream), number * LANES, 1e-3), world) for number in numbers]


def train_with_every_engine(world: World, folder: str) -> dict[str, list[list[dict[str, float]]]]:
    """Figures of each step, by recipe, then by engine; on the way, halfway through the first is resumed to its bits."""
    figures = {}
    for index, name in enumerate(RECIPES):
        configs = [recipe_config(name, engine=engine) for engine in engines_of(name)]
        steps = [build_step("train_lightningdit", each, world) for each in configs]
        figures[name] = [take(step, world, range(STEPS)) for step in steps]
        fresh, half = TrainState(images_seen=0, config="c", data="d"), STEPS // 2
        first, second = (build_step("train_lightningdit", configs[0], world) for _ in range(2))
        take(first, world, range(half))
        storage = Storage(f"{folder}/{index}")
        checkpoints = Checkpoints(storage, fresh, Retention(2), world)
        checkpoints.save(first, fresh.after(half * LANES), {}, lambda: None)
        checkpoints.wait_for_pending_save()
        Checkpoints(storage, fresh, Retention(2), world).restore(second)
        take(second, world, range(half, STEPS))
        resumed = second.engines["lightningdit"].weights()
        for weight, tensor in steps[0].engines["lightningdit"].weights().items():
            assert tensor.equal(resumed[weight]), (name, weight)
    return figures


def test_routing_is_drawn_by_lane_and_step_until_all_tokens_take_all_blocks() -> None:
    step = build_step("train_lightningdit", recipe_config("routing with fusion", engine=TORCH), World())
    assert isinstance(step, DiffusionStep)

    def draw(lane: int, number: int, images_seen: int = 0) -> tuple[Tensor | None, Tensor | None]:
        inputs = step._draw(step.source()[MicroBatchKey(lane, number)], images_seen)
        return inputs.keep, inputs.path_dropped

    keep, dropped = draw(1, 2)
    assert keep is not None
    assert dropped is not None
    again, others, last = draw(1, 2, 3 * LANES - 1), (draw(0, 2), draw(1, 3)), draw(1, 2, 3 * LANES)
    assert keep.equal(again[0])
    assert not any(keep.equal(other) for other, _ in others)
    assert last[0] is None
    assert dropped.equal(last[1])
    many, same = ([draw(lane, number)[1] for lane in range(4) for number in range(50)] for _ in range(2))
    assert all(one is not None and two is not None and one.equal(two) for one, two in zip(many, same, strict=True))
    share = sum(int(one.sum()) for one in many if one is not None) / 400
    assert share == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 400) ** 0.5)


@pytest.mark.gloo
def test_every_engine_takes_the_same_steps_and_goes_on_to_the_same_bits(gloo: GlooLauncher, tmp_path: Path) -> None:
    for name, (plain, *others) in gloo.run(2, train_with_every_engine, str(tmp_path))[0].items():
        for engine, figures in zip(engines_of(name)[1:], others, strict=True):
            for step, (ours, theirs) in enumerate(zip(figures, plain, strict=True)):
                assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), (name, engine, step)
        if name.endswith("average velocities"):
            step = build_step("train_lightningdit", recipe_config(name, engine=TORCH), World())
            alone = take(step, World(), range(STEPS))
            for ours, theirs in zip(alone, plain, strict=True):  # of two ranks
                assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), name


def train_combined(names: Sequence[str]) -> None:
    """Take two steps with some options together."""
    step = build_step("train_lightningdit", recipe_config(*names, engine=TORCH), World())
    for figures in take(step, World(), range(2)):
        assert all(map(math.isfinite, figures.values())), (names, figures)


def goes_together(names: Iterable[str]) -> bool:
    """Return whether no two of these options are refused together."""
    return not any(pair <= {*names} for pair in APART)


def test_any_two_go_together() -> None:
    for pair in filter(goes_together, combinations(OPTIONS, 2)):
        train_combined(pair)


def test_what_does_not_go_with_average_velocities_is_one_line() -> None:
    with pytest.raises(ValidationError, match=r"max_scale=4 draws the scale .*: leave scale, mix and interval out"):
        recipe_config("average velocities", "improved average velocities", engine=TORCH)
    pairs = [pair for pair in APART if any(name.endswith("average velocities") for name in pair)]
    for pair in pairs[1:]:
        with pytest.raises(ValidationError, match=r"objective\.mean_flow does not go together with lightningdit\."):
            recipe_config(*pair, engine=TORCH)
    with pytest.raises(ValidationError, match=r"together with train_lightningdit\.engine\.zero_stage=3"):
        recipe_config("average velocities", engine=ZERO[3])


@pytest.mark.long
def test_all_combinations_go_together() -> None:
    for count in range(3, len(OPTIONS)):
        for names in filter(goes_together, combinations(OPTIONS, count)):
            train_combined(names)
