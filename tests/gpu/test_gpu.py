"""What only a GPU can show. `bash tests/run.sh --gpu` runs it; without a GPU it says so and fails."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_steps import JOBS, LANES, build_step, figures_of, tiny_config

from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import assign_lanes
from vavae.distributed.torch_settings import configure_torch
from vavae.distributed.world import World
from vavae.runs.config import RunConfig
from vavae.runs.jobs import Job
from vavae.storage.storage import Storage
from vavae.training.checkpoints.checkpoint import Checkpoints
from vavae.training.checkpoints.retention import Retention
from vavae.training.checkpoints.state import TrainState
from vavae.training.step import Step

pytestmark = pytest.mark.gpu

_ENGINES: list[dict[str, Any]] = [
    {"backend": "torch"},
    *({"zero_stage": stage, "persistence_threshold": 0} for stage in range(4)),
    {"zero_stage": 2, "offload_optimizer": True},
]


@pytest.fixture(scope="module", autouse=True)
def world() -> World:
    """One rank on the first GPU, with bits that come out the same every time."""
    assert torch.cuda.is_available(), "these tests need a GPU"
    configure_torch(deterministic_config().workers)
    return World(device=torch.device("cuda", 0))


def deterministic_config(**training: Any) -> RunConfig:
    """The tiny configuration with bits that come out the same every time, unless blocks are compiled."""
    config = tiny_config(**training)
    workers = config.workers.model_copy(update={"use_gpu": True, "deterministic": True})
    return config.model_copy(update={"workers": workers})


def steps(world: World, job: Job, count: int = 5, **training: Any) -> list[dict[str, float]]:
    """The figures of some steps."""
    step = build_step(job, deterministic_config(**training), world)
    accumulation_steps = assign_lanes(LANES, world.rank, world.size)
    stream = load_micro_batches(step.source(), accumulation_steps, 0, workers=0, pin_memory=world.device.type == "cuda")
    figures = []
    for number in range(count):
        result = step.run(next(stream), number * LANES, 1e-4)
        figures.append(figures_of(result, world))
    return figures


@pytest.mark.parametrize("engine", _ENGINES, ids=str)
@pytest.mark.parametrize("job", JOBS)
def test_every_engine_trains_on_it_to_the_same_bits_twice(world: World, job: Job, engine: dict[str, Any]) -> None:
    assert steps(world, job, engine=engine) == steps(world, job, engine=engine)


@pytest.mark.parametrize("job", JOBS)
def test_engines_agree(world: World, job: Job) -> None:
    plain = steps(world, job, engine=_ENGINES[0])
    for engine in _ENGINES[1:]:
        for ours, theirs in zip(steps(world, job, engine=engine), plain, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("job", JOBS)
def test_compiled_blocks_agree_with_eager_ones(world: World, job: Job) -> None:
    eager = steps(world, job)
    for ours, theirs in zip(steps(world, job, compile_blocks=True), eager, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("job", JOBS)
def test_bf16_stays_near_fp32(world: World, job: Job) -> None:
    # The first output of a LightningDiT is zero in any precision.
    fp32, bf16 = (steps(world, job, count=3, precision=precision)[-1] for precision in ("fp32", "bf16"))
    assert bf16["loss/total"] == pytest.approx(fp32["loss/total"], rel=0.05)
    assert bf16["loss/total"] != fp32["loss/total"]


def test_tf32_is_a_choice(world: World) -> None:
    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).to(world.device)
    exact = a.double() @ a.double()
    errors = {}
    for tf32 in (False, True):
        configure_torch(tiny_config().workers.model_copy(update={"tf32": tf32}))
        errors[tf32] = ((a @ a).double() - exact).abs().max().item()
    assert errors[True] > 10 * errors[False]


def test_a_checkpoint_goes_on_to_the_same_bits(world: World, tmp_path: Path) -> None:
    fresh = TrainState(images_seen=0, config="c", data="d")

    def run(step: Step, numbers: range) -> None:
        stream = load_micro_batches(step.source(), assign_lanes(LANES, 0, 1), numbers.start, workers=0)
        for number in numbers:
            step.run(next(stream), number * LANES, 1e-4)

    config = deterministic_config(engine={"zero_stage": 2})
    straight, first, second = (build_step("train_lightningdit", config, world) for _ in range(3))
    run(straight, range(6))
    run(first, range(3))
    checkpoints = Checkpoints(Storage(str(tmp_path)), fresh, Retention(2), world)
    checkpoints.save(first, fresh.after(3 * LANES), {}, lambda: None)
    checkpoints.wait_for_pending_save()
    Checkpoints(Storage(str(tmp_path)), fresh, Retention(2), world).restore(second)
    run(second, range(3, 6))
    for name, tensor in straight.engines["lightningdit"].weights().items():
        assert second.engines["lightningdit"].weights()[name].equal(tensor), name
