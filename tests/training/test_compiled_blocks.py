"""Blocks that are compiled do what they did, keep their names, and are refused where they can't work."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support import image_shards, small_models
from support.engine_parity import TORCH, ZERO
from support.gloo import GlooLauncher
from support.trained_run import trained_run
from support.training_steps import JOBS, LANES, build_step, figures_of, tiny_config
from torch import Tensor, nn

from vavae.config import load
from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import assign_lanes
from vavae.distributed import compilation
from vavae.distributed.compilation import compile_each, compiles_blocks
from vavae.distributed.config import EngineConfig, WorkersConfig
from vavae.distributed.world import World
from vavae.latents.encoding import place_tokenizer
from vavae.randomness import torch_generator
from vavae.runs.config import RunConfig
from vavae.runs.jobs import Job
from vavae.runs.run import Run
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.runs.training_inputs import LightningDiTTrainingInputs
from vavae.sampling.sampler import Sampler
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
    whole_weights = EngineConfig(**engine).has_whole_weights
    assert compiles_blocks(setting, workers, torch.device(device), whole_weights) is compiles


class Reshape(nn.Module):
    """A graph without arithmetic, which takes no time to compile."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten()


def test_every_shape_is_compiled_in_any_thread() -> None:
    """More shapes than torch compiles by default, in a thread that knows nothing of this one's settings."""
    block, counted = Reshape(), torch._dynamo.utils.counters["frames"]
    compile_each([block])
    before = counted["ok"]
    with ThreadPoolExecutor(1) as thread:
        for size in range(2, 12):
            assert thread.submit(block, torch.ones(size, 3)).result().shape == (3 * size,)
    assert counted["ok"] - before == 10


@pytest.mark.skipif(" " in torch.__file__, reason="torch gives its compiler paths without quotes")
def test_extraction_and_sampling_give_the_same_compiled(tmp_path: Path) -> None:
    stored = SamplingInputs.of(trained_run(tmp_path))
    images = torch.rand(3, 3, image_shards.SIZE, image_shards.SIZE, generator=torch_generator(0, "images")) * 2 - 1
    noise = torch.randn(3, small_models.TOKENIZER.latent_dim, 4, 4, generator=torch_generator(0, "noise"))
    outputs = {}
    for compiles in (False, True):
        sections = {
            name: getattr(stored.config, name).model_copy(update={"compile_blocks": compiles})
            for name in ("latents", "sample")
        }
        inputs = replace(stored, config=stored.config.model_copy(update=sections))
        tokenizer = place_tokenizer(small_models.tokenizer(), inputs.config, torch.device("cpu"))
        sampler = Sampler.load(inputs, torch.device("cpu"))
        for blocks in (tokenizer.residual_blocks(), sampler.tokenizer.residual_blocks(), sampler.lightningdit.blocks):
            assert all((block._compiled_call_impl is not None) == compiles for block in blocks)
        with torch.inference_mode():
            posterior = tokenizer.encode(images)
            velocity = sampler.lightningdit(noise, torch.full((3,), 0.4), torch.arange(3))
            outputs[compiles] = (posterior.mean, posterior.std, velocity, sampler.tokenizer.decode(noise))
    for found, expected in zip(outputs[True], outputs[False], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


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
    monkeypatch.setattr(train_module, "_train_lightningdit", lambda *_: None)
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
