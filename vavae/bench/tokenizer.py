"""Benchmark of the tokenizer's training step: the cost of its exact adaptive weights, before and with an adversary."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import cast

import torch

from vavae.bench.backbones import with_random_backbones
from vavae.bench.computation import Computation, Side, build_side, dense_peak
from vavae.bench.steps import StepTurns, assert_equal_steps
from vavae.data.image_stream import ImageMicroBatch, ImageStream
from vavae.data.sample_order import assign_lanes
from vavae.distributed.world import World
from vavae.randomness import torch_generator
from vavae.runs.config import RunConfig
from vavae.training.flops.flops import training_flops
from vavae.training.tokenizer_step import TokenizerStep

CONSTANT, EXACT = "constant weights", "exact weights"
_EVERY = 8
"""Steps of a turn, one of which measures where the weights are refreshed now and then."""
REFRESHED = f"weights refreshed every {_EVERY} steps"
_STEPS = {EXACT: 1, REFRESHED: _EVERY, CONSTANT: 1 << 30}
"""Steps that one measurement of the adaptive weights serves; constant ones are measured in the first step alone."""


def tokenizer_benchmarks(config: RunConfig, world: World) -> Iterator[Computation]:
    """Benchmarks of the step without and with an adversary, whose sides differ in their adaptive weights alone.

    Teacher and LPIPS have random weights.

    Args:
        config: configuration of a run; `stream.lanes` micro-batches are shared by the ranks. Of a training in phases
            the losses before the first are taken.
        world: the ranks.
    """
    adversarial = config.losses.adversarial
    with tempfile.TemporaryDirectory(prefix="vavae-") as folder:
        config = with_random_backbones(config, Path(folder))
        for weight, words in ((0.0, "without adversary"), (adversarial.weight or 0.5, "with adversary")):
            update = {"adversarial": adversarial.model_copy(update={"weight": weight, "start_images": 0})}
            training = config.train_vavae.model_copy(update={"stages": ()})
            losses = config.losses.model_copy(update=update)
            yield _benchmark(config.model_copy(update={"losses": losses, "train_vavae": training}), world, words)


def _benchmark(config: RunConfig, world: World, words: str) -> Computation:
    training, images = config.train_vavae, _EVERY * config.train_vavae.batch_size // world.size
    turns: dict[str, StepTurns] = {}
    sides: dict[str, Side] = {}
    for name, every in _STEPS.items():
        run = _with_adaptive_weights(config, every)
        flops = partial(_flops, run, images)
        sides[name] = build_side(partial(_add_turns, turns, name, run, world), flops, world.device)
    # In the first step all of them measure the weights.
    assert_equal_steps(turns, 0.0 if world.device.type == "cpu" else 1e-3)
    height, width = config.shards.height_and_width
    name = f"tokenizer step {words}, {training.batch_size} images of {height} x {width}, {training.precision}"
    pairs = [(side, CONSTANT) for side in (EXACT, REFRESHED)]
    peak = dense_peak(world.device, training.precision, config.workers.rounds_to_tf32)
    return Computation(name, images, sides, pairs, world.device, peak)


def _flops(config: RunConfig, images: int) -> float:
    return images * training_flops(config, "train_vavae")


def _with_adaptive_weights(config: RunConfig, every: int) -> RunConfig:
    adaptive = config.losses.adaptive.model_copy(update={"every": every})
    return config.model_copy(update={"losses": config.losses.model_copy(update={"adaptive": adaptive})})


def _add_turns(turns: dict[str, StepTurns], name: str, config: RunConfig, world: World) -> StepTurns:
    (phase,) = config.tokenizer_phases()
    # The stream is what the trainer reads from; here micro-batches are at hand.
    step = TokenizerStep(config, phase, None, cast(ImageStream, None), world)
    lanes = assign_lanes(config.stream.lanes, world.rank, world.size)
    micro_batches = [_micro_batch(config, each.lane, world.device) for each in lanes]
    turns[name] = StepTurns(step, micro_batches, config.train_vavae, _EVERY)
    return turns[name]


def _micro_batch(config: RunConfig, lane: int, device: torch.device) -> ImageMicroBatch:
    """Images of one micro-batch, as a loader hands them over."""
    count = config.train_vavae.batch_size // config.stream.lanes
    shape = (count, *config.shards.height_and_width, config.shards.channels)
    images = torch.randint(0, 256, shape, generator=torch_generator(0, "bench", lane), dtype=torch.uint8)
    labels = torch.zeros(count, dtype=torch.int64)
    if device.type == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()
    return ImageMicroBatch(lane, 0, images.permute(0, 3, 1, 2), labels)
