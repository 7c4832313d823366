"""Blocks that are compiled do what they did, keep their names, and are refused where they can't work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.engine_parity import TORCH, ZERO
from support.gloo import GlooLauncher
from support.trained_run import trained_run
from support.training_steps import JOBS, LANES, build_step, figures_of, tiny_config

from vavae.config import load
from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import assign_lanes
from vavae.distributed import compilation
from vavae.distributed.compilation import compiles_blocks
from vavae.distributed.config import EngineConfig, WorkersConfig
from vavae.distributed.world import World
from vavae.runs.config import RunConfig
from vavae.runs.run import Job, Run
from vavae.runs.training_inputs import LightningDiTTrainingInputs
from vavae.training import train as train_module
from vavae.training.session import LocalSession


def train_some_steps(
    world: World, job: Job, engine: dict[str, Any], compiles: bool
) -> tuple[list[str], list[dict[str, float]]]:
    """Names of the weights, and the metrics of each step."""
    config = tiny_config(engine=engine, compile_blocks=compiles)
    dit = config.lightningdit.model_copy(update={"checkpoint_activations": compiles})
    step = build_step(job, config.model_copy(update={"lightningdit": dit}), world)
    stream = load_micro_batches(step.source(), assign_lanes(LANES, world.rank, world.size), 0, workers=0)
    results = [step.run(next(stream), 0, 1e-3) for _ in range(4 if job == "train_lightningdit" else 1)]
    names = [name for trained in step.engines.values() for name in trained.weights()]
    return names, [figures_of(each, world) for each in results]


@pytest.mark.gloo
@pytest.mark.skipif(" " in torch.__file__, reason="torch gives its compiler paths without quotes")
@pytest.mark.parametrize("job", JOBS)
def test_compiled_blocks_take_the_same_steps(gloo: GlooLauncher, job: Job) -> None:
    names, metrics = gloo.run(1, train_some_steps, job, TORCH, False)[0]
    ranks = 2 if job == "train_lightningdit" else 1
    compiled_names, compiled = gloo.run(ranks, train_some_steps, job, ZERO[2], True)[0]
    assert compiled_names == names
    for ours, theirs in zip(compiled, metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_zero_stage_3_cannot_be_compiled() -> None:
    with pytest.raises(ValidationError, match=r"compile_blocks=true with engine\.zero_stage=3"):
        tiny_config().train_lightningdit.model_validate(
            {"images": 1, "compile_blocks": True, "engine": {"zero_stage": 3}}
        )


@pytest.mark.parametrize(
    ("setting", "engine", "deterministic", "device", "compiles"),
    [
        (None, {}, False, "cuda", True),
        (None, {"backend": "torch"}, False, "cuda", True),
        (None, {"zero_stage": 3}, False, "cuda", False),
        (None, {}, True, "cuda", False),
        (None, {}, False, "cpu", False),
        (True, {}, True, "cpu", True),
        (False, {}, False, "cuda", False),
    ],
)
def test_gpus_that_promise_no_bits_compile(
    monkeypatch: pytest.MonkeyPatch,
    setting: bool | None,
    engine: dict[str, Any],
    deterministic: bool,
    device: str,
    compiles: bool,
) -> None:
    monkeypatch.setattr(compilation, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    workers = WorkersConfig(use_gpu=device == "cuda", deterministic=deterministic)
    assert compiles_blocks(setting, EngineConfig(**engine), workers, torch.device(device)) is compiles


@pytest.mark.parametrize("engine", [{"backend": "torch"}, {"zero_stage": 0}])
def test_only_sharded_optimizers_are_offloaded(engine: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="offload_optimizer=true with backend="):
        tiny_config(engine={**engine, "offload_optimizer": True})


@pytest.mark.parametrize(
    ("offloads", "threads", "rank", "lines"), [(True, 3, 0, 1), (True, 4, 0, 0), (True, 3, 1, 0), (False, 1, 0, 0)]
)
def test_an_offloaded_optimizer_with_few_threads_is_one_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    offloads: bool,
    threads: int,
    rank: int,
    lines: int,
) -> None:
    config = trained_run(tmp_path).storage.local_file("config.yaml")
    settings = [f"workers.threads={threads}", f"train_lightningdit.engine.offload_optimizer={offloads}"]
    settings.append("train_lightningdit.ema_ramp=0.09")  # of one step, which is another warning without
    inputs = LightningDiTTrainingInputs.of(Run(load(RunConfig, config, settings)))
    monkeypatch.setattr(train_module, "train_lightningdit", lambda *_: None)
    train_module.train(inputs, LocalSession(), World(rank=rank, size=2))
    assert len(caplog.messages) == lines
    for line in caplog.messages:
        assert "train_lightningdit.engine.offload_optimizer=true" in line
        assert "workers.threads=3" in line
        assert "set workers.threads and workers.cpus to 4 or more" in line
        assert "\n" not in line


def test_a_minimum_above_the_number_of_workers_is_refused() -> None:
    with pytest.raises(ValidationError, match="min_count=3 exceeds count=2"):
        tiny_config().workers.model_validate({"count": 2, "min_count": 3})
