"""The same few steps of both trainings under any engine, and what they did."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from support.training_steps import BATCH, JOBS, LANES, build_step, figures_of, tiny_config
from torch import Tensor, nn

import vavae.distributed.deepspeed_engine
import vavae.distributed.engine
from vavae.data.image_stream import ImageMicroBatch
from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import assign_lanes
from vavae.distributed.world import World
from vavae.runs.config import RunConfig
from vavae.runs.jobs import Job
from vavae.training.step import Step

TORCH: dict[str, Any] = {"backend": "torch"}
ZERO: list[dict[str, Any]] = [
    {"backend": "deepspeed", "zero_stage": stage, "persistence_threshold": 0} for stage in range(4)
]
"""By stage; without the threshold, stage 3 would leave so small a network whole."""
OFFLOADED: list[dict[str, Any]] = [{**ZERO[stage], "offload_optimizer": True} for stage in (2, 3)]
"""With the optimizer in the host's memory."""


class Setup(NamedTuple):
    """What may differ between two runs of the same trainings."""

    engine: dict[str, Any]
    lanes: int = LANES
    recompute: bool = False
    """Checkpoint activations: the adaptive weights differentiate the recomputed graph several times."""
    smooth: bool = False
    """Networks, losses and images without kinks, on either side of which two engines may end up by rounding."""
    sgd: bool = True
    """An optimizer with which an error of a gradient is as large in the weights, instead of Adam."""
    precision: str = "fp32"
    steps: int = 10
    lanes_at_once: int = 1
    muon: dict[str, Any] | None = None
    """Settings of Muon, in all optimizers."""


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
    return {job: train_job(world, job, setup) for job in JOBS}


def _config(setup: Setup) -> RunConfig:
    rates = (1e-5, 1e-2, 5e-2) if setup.sgd else (1e-4, 1e-4, 1e-4)
    muon = {} if setup.muon is None else {"muon": setup.muon}
    generator, discriminator = ({"learning_rate": rate, "max_grad_norm": None, **muon} for rate in rates[:2])
    config = tiny_config(
        engine=setup.engine,
        precision=setup.precision,
        batch_size=BATCH // LANES * setup.lanes,
        # A LightningDiT begins with an infinite gradient, but for an epsilon: see the velocity direction loss.
        optimizer={"learning_rate": rates[2], "max_grad_norm": 1.0, **muon},
        train_vavae={"optimizer": generator, "discriminator_optimizer": discriminator},
    )
    if setup.smooth:
        config = smooth_config(config)
    # Adam makes whole steps of the rounding in the gradients of biases that a normalization cancels: those in front of
    # one with as many groups as channels, which no network has that one would train.
    tokenizer = {"channels": 32 if setup.sgd else 64, "checkpoint_activations": setup.recompute}
    sections = {
        "stream": config.stream.model_copy(update={"lanes": setup.lanes}),
        "tokenizer": config.tokenizer.model_copy(update=tokenizer),
        "lightningdit": config.lightningdit.model_copy(update={"checkpoint_activations": setup.recompute}),
        "train_lightningdit": config.train_lightningdit.model_copy(update={"lanes_at_once": setup.lanes_at_once}),
    }
    return config.model_copy(update=sections)


def train_job(world: World, job: Job, setup: Setup) -> History:
    """A few steps of one training."""
    if setup.sgd:
        for module in (vavae.distributed.engine, vavae.distributed.deepspeed_engine):
            module.build_optimizer = lambda parameters, config, *_: torch.optim.SGD(
                [*parameters.values()], config.learning_rate, fused=True
            )
    config = _config(setup)
    training = getattr(config, job)
    step = build_step(job, config, world)
    stream = load_micro_batches(step.source(), assign_lanes(setup.lanes, world.rank, world.size), 0, workers=0)
    if setup.smooth:
        smooth_networks(step)
    before, figures = _parameters(step.engines, world), []
    for number in range(setup.steps):
        micro_batches = next(stream)
        if setup.smooth:
            smooth_images(micro_batches)
        result = step.run(micro_batches, number * training.batch_size, training.optimizer.learning_rate / (1 + number))
        figures.append(figures_of(result, world))
    after = _parameters(step.engines, world)
    here = {
        f"{engine}.{name}": parameter.detach()
        for engine in step.engines
        for name, parameter in step.engines[engine].module.named_parameters()
        if not hasattr(parameter, "ds_tensor")
    }
    return History(figures, before, after, max((error(here[name], after[name]) for name in here), default=0.0))


def smooth_config(config: RunConfig) -> RunConfig:
    """Losses without a kink, but for that at equal pixels."""
    vision_foundation = config.losses.vision_foundation.model_copy(update={"distmat_weight": 0.0})
    return config.model_copy(
        update={"losses": config.losses.model_copy(update={"vision_foundation": vision_foundation})}
    )


def smooth_images(micro_batches: Sequence[Any]) -> None:
    """Leave black and white, which no reconstruction meets."""
    for item in micro_batches:
        if isinstance(item, ImageMicroBatch):
            item.images.copy_(255 * (item.images > 127))


def smooth_networks(step: Step) -> None:
    """Put a smooth activation in the place of each that has a kink."""
    networks = [*(engine.module for engine in step.engines.values()), getattr(step, "teacher", nn.Identity())]
    for layer in [layer for network in networks for layer in network.modules()]:
        for name, child in layer.named_children():
            if isinstance(child, (nn.ReLU, nn.ReLU6, nn.LeakyReLU)):
                setattr(layer, name, nn.SiLU())


def _parameters(engines: Mapping[str, Any], world: World) -> dict[str, Tensor]:
    whole = {name: world.broadcast(engine.weights()) for name, engine in engines.items()}
    return {
        f"{engine}.{name}": whole[engine][name]
        for engine in engines
        for name, _ in engines[engine].module.named_parameters()
    }


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of an element."""
    return (ours - theirs).abs().max().item()
