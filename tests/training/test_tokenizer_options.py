"""Options of the tokenizer's training beyond the paper: every engine, exact resume, and what they leave alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_parity import TORCH, ZERO
from support.gloo import GlooLauncher
from support.training_steps import LANES, build_step, figures_of, tiny_config
from torch import Tensor

from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import assign_lanes
from vavae.distributed.world import World
from vavae.runs.config import RunConfig
from vavae.storage.storage import Storage
from vavae.training.checkpoints.checkpoint import Checkpoints
from vavae.training.checkpoints.retention import Retention
from vavae.training.checkpoints.state import TrainState
from vavae.training.step import Step

STEPS = 3
ENGINES = [TORCH, *ZERO]
OPTIONS: dict[str, dict[str, Any]] = {
    "interpolated noise": {"latent_noise": {}},
    "added noise": {"latent_noise": {"kind": "add", "scale": 0.8}, "adaptive": {"every": 2}},
}
"""By name: what each writes into the losses."""


def option_config(name: str, engine: dict[str, Any]) -> RunConfig:
    """The tiny configuration with an option."""
    return tiny_config(losses=OPTIONS[name], engine=engine)


def take(step: Step, world: World, numbers: range) -> list[dict[str, float]]:
    """Figures of some steps."""
    stream = load_micro_batches(step.source(), assign_lanes(LANES, world.rank, world.size), numbers.start, workers=0)
    return [figures_of(step.run(next(stream), number * LANES, 1e-4), world) for number in numbers]


def weights_of(step: Step) -> dict[str, Tensor]:
    """Weights of all engines."""
    return {
        f"{name}.{key}": tensor for name, engine in step.engines.items() for key, tensor in engine.weights().items()
    }


def train_with_every_engine(world: World, folder: str) -> dict[str, list[list[dict[str, float]]]]:
    """Figures of each step, by option, then by engine; on the way, the first is resumed in the middle to its bits."""
    figures = {}
    for index, name in enumerate(OPTIONS):
        configs = [option_config(name, engine) for engine in ENGINES]
        steps = [build_step("train_vavae", each, world) for each in configs]
        figures[name] = [take(step, world, range(STEPS)) for step in steps]
        fresh, half = TrainState(images_seen=0, config="c", data="d"), STEPS // 2
        first, second = (build_step("train_vavae", configs[0], world) for _ in range(2))
        take(first, world, range(half))
        storage = Storage(f"{folder}/{index}")
        checkpoints = Checkpoints(storage, fresh, Retention(2), world)
        checkpoints.save(first, fresh.after(half * LANES), {}, lambda: None)
        checkpoints.wait_for_pending_save()
        Checkpoints(storage, fresh, Retention(2), world).restore(second)
        take(second, world, range(half, STEPS))
        resumed = weights_of(second)
        for weight, tensor in weights_of(steps[0]).items():
            assert tensor.equal(resumed[weight]), (name, weight)
    return figures


@pytest.mark.gloo
def test_every_engine_takes_the_same_steps_and_resumes_to_the_same_bits(gloo: GlooLauncher, tmp_path: Path) -> None:
    of_two = gloo.run(2, train_with_every_engine, str(tmp_path))[0]
    for name, (plain, *others) in of_two.items():
        alone = take(build_step("train_vavae", option_config(name, TORCH), World()), World(), range(STEPS))
        for engine, figures in zip(["one rank", *ENGINES[1:]], [alone, *others], strict=True):
            for step, (ours, theirs) in enumerate(zip(figures, plain, strict=True)):
                assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), (name, engine, step)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_what_is_decoded_alone(name: str) -> None:
    """Alignment and KL are those of the posterior sample, whatever is decoded."""
    plain = take(build_step("train_vavae", tiny_config(engine=TORCH), World()), World(), range(1))[0]
    ours = take(build_step("train_vavae", option_config(name, TORCH), World()), World(), range(1))[0]
    assert ours.keys() == plain.keys()
    same = ("loss/kl", "loss/cosine", "loss/distance", "alignment")
    assert [ours[each] for each in same] == [plain[each] for each in same]
    assert ours["loss/l1"] != plain["loss/l1"]
    assert all(torch.tensor(value).isfinite() for value in ours.values())
