"""What each stage of a run takes on the machines of an offer."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vavae.diffusion.guidance import ClassifierFreeGuidance
from vavae.diffusion.solvers import solve
from vavae.planning.estimate import latent_bytes, sample_bytes, trained_parameters, training_bytes
from vavae.planning.formulas import (
    Arithmetic,
    accumulation_steps_of,
    arithmetic_of,
    best_rate,
    exposed_seconds,
    gradient_bytes,
)
from vavae.planning.offer import Offer
from vavae.planning.safety import Safety, safety_of
from vavae.runs.config import RunConfig, TrainingConfig
from vavae.runs.run import Job
from vavae.training.flops.flops import decoding_flops, encoding_flops, training_flops, velocity_flops

_MEASURED_SIDE = 256
_DECODED = {"jpeg": 3000.0, "png": 400.0}
"""Images of 256 px that one core (AMD EPYC) decodes in a second."""
_PREPARED = {"jpeg": 300.0, "png": 70.0}
"""Photographs of half a megapixel, likewise, that it decodes, scales to 256 px and encodes."""
_MAPPED = 130_000.0
"""Latents of 32 x 16 x 16, likewise, that it gathers into batches; `vavae bench data`."""
_BYTES_PER_PIXEL = {"jpeg": 0.8, "png": 1.85}
"""Of photographs, at the default quality."""


class Dataset(NamedTuple):
    """What a plan is told of the images, which need not be here."""

    images: int
    image_bytes: float | None = None
    """Mean size of a stored image; none takes what photographs have in the format of the shards."""


@dataclass(frozen=True)
class JobEstimate:
    """One stage."""

    job: Job
    images: int
    steps: int | None
    flops: float
    """Of one image, on average over the stage."""
    rates: dict[str, float]
    """Images/s over all machines that each thing would allow by itself."""
    images_per_second: float
    """What is expected when they come together."""
    bytes_read: float
    """From the store, for one image."""
    bytes_written: float
    """To the store, in all."""
    arithmetic: Arithmetic | None = None
    """On GPUs; none where none is used."""
    safety: Safety | None = None
    """Checkpoints and memory, of trainings."""

    @property
    def hours(self) -> float:
        """From start to end, with what checkpoints and failures cost."""
        lost = 0.0 if self.safety is None else self.safety.lost
        return self.images / self.images_per_second / (1 - lost) / 3600

    @property
    def bottleneck(self) -> str:
        """What allows the fewest images/s."""
        return min(self.rates, key=self.rates.__getitem__)


def estimate_jobs(config: RunConfig, offer: Offer, dataset: Dataset) -> list[JobEstimate]:
    """All stages but the last: what `evaluate` takes is not counted."""
    return [
        _prepare(config, offer, dataset),
        _train(config, offer, "train_vavae", tokenizer_flops(config), stored_bytes(config, dataset)),
        _extract(config, offer, dataset),
        _train(config, offer, "train_lightningdit", training_flops(config, "train_lightningdit"), latent_bytes(config)),
        _sample(config, offer),
    ]


def stored_bytes(config: RunConfig, dataset: Dataset) -> float:
    """Of one image among the shards."""
    return dataset.image_bytes or _BYTES_PER_PIXEL[_form(config)] * config.shards.image_size**2


def tokenizer_flops(config: RunConfig) -> float:
    """Of one image in a training step of the tokenizer, on average over its stages and its adversary's absence."""
    budget = config.train_vavae.images
    turns = {0, budget}
    for stage in config.tokenizer_phases():
        turns |= {stage.from_images, stage.losses.adversarial.start_images}
    mean = 0.0
    for start, end in pairwise(sorted(turn for turn in turns if turn <= budget)):
        mean += training_flops(config, "train_vavae", start) * ((end - start) / budget)
    return mean


def evaluations(config: RunConfig) -> int:
    """How often the LightningDiT is asked for the velocity of one sample, guidance included.

    `dopri5` is counted on the flow between two equal Gaussians, v = (2t - 1) / (t² + (1 - t)²) x; images take it more.
    """
    guidance = ClassifierFreeGuidance(lambda x, t, y: x, 0, config.guidance)
    count = 0

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        nonlocal count
        count += len(x) + int(guidance.active(t).sum())
        return x * ((2 * t - 1) / (t**2 + (1 - t) ** 2)).view(-1, 1, 1, 1)

    noise = torch.ones(1, config.tokenizer.latent_dim, config.grid, config.grid)
    solve(velocity, noise, torch.zeros(1, dtype=torch.int64), config.solver, guidance.jumps)
    return count


def _form(config: RunConfig) -> str:
    """How most images are stored."""
    return "jpeg" if config.shards.keep_original else config.shards.format


def _of_this_size(config: RunConfig, rate: float) -> float:
    """Images/s of a core at the run's size, from those at the size that was measured."""
    return rate * (_MEASURED_SIDE / config.shards.image_size) ** 2


def _store_rate(offer: Offer, bytes_per_image: float) -> float:
    return offer.nodes * offer.store / bytes_per_image


def _prepare(config: RunConfig, offer: Offer, dataset: Dataset) -> JobEstimate:
    written = stored_bytes(config, dataset)
    rates = {
        "encoding": offer.count * _of_this_size(config, _PREPARED[_form(config)]),
        "store": _store_rate(offer, written),
    }
    total = dataset.images * written
    return JobEstimate("prepare_shards", dataset.images, None, 0.0, rates, min(rates.values()), 0, total)


def _extract(config: RunConfig, offer: Offer, dataset: Dataset) -> JobEstimate:
    """Each actor decodes and encodes in turns; those that share a GPU fill each other's gaps."""
    flops = encoding_flops(config) * (1 + config.latents.flip)
    arithmetic = arithmetic_of("fp32", config.workers.tf32)
    computing = _seconds(flops, offer, arithmetic)
    decoding = 1 / _of_this_size(config, _DECODED[_form(config)])
    actors = offer.count / config.latents.gpus
    read, written = stored_bytes(config, dataset), latent_bytes(config)
    rates = {
        "compute": offer.count / computing,
        "decoding": actors / (decoding + computing),
        "store": _store_rate(offer, read + written),
    }
    total, rate = dataset.images * written, min(rates.values())
    return JobEstimate("precompute_latents", dataset.images, None, flops, rates, rate, read, total, arithmetic)


def _sample(config: RunConfig, offer: Offer) -> JobEstimate:
    flops = velocity_flops(config) * evaluations(config) + decoding_flops(config)
    arithmetic = arithmetic_of("fp32", config.workers.tf32)
    rate = offer.count / _seconds(flops, offer, arithmetic)
    images, written = config.sample.images, sample_bytes(config)
    return JobEstimate("sample", images, None, flops, {"compute": rate}, rate, 0, written, arithmetic)


def _seconds(flops: float, offer: Offer, arithmetic: Arithmetic) -> float:
    """Of so many FLOPs on one GPU."""
    return flops / best_rate(offer.gpu, arithmetic) / offer.utilization


def _train(config: RunConfig, offer: Offer, job: Job, flops: float, bytes_read: float) -> JobEstimate:
    training: TrainingConfig = getattr(config, job)
    lanes, batch, stage = config.stream.lanes, training.batch_size, training.engine.zero_stage
    accumulation_steps = accumulation_steps_of(lanes, offer.count)
    images_of_a_gpu = accumulation_steps * batch // lanes
    arithmetic = arithmetic_of(training.precision, config.workers.tf32)
    compute = images_of_a_gpu * _seconds(flops, offer, arithmetic)
    parameters = sum(trained_parameters(config, job).values())
    leaving = gradient_bytes(parameters, offer.count, stage, accumulation_steps)
    communication = leaving / offer.interconnect
    readers = offer.count * max(1, config.stream.workers)
    decoded = _MAPPED if job == "train_lightningdit" else _of_this_size(config, _DECODED[_form(config)])
    rates = {
        "compute": batch / compute,
        "decoding": readers * decoded,
        "store": _store_rate(offer, bytes_read),
    }
    if communication:
        rates["network"] = batch / communication
    together = batch / (compute + exposed_seconds(communication, compute, stage))
    rate = min(together, rates["decoding"], rates["store"])
    safety = safety_of(config, offer, job, rate)
    rates["checkpoints"] = training.checkpoint_images / safety.upload_seconds
    return JobEstimate(
        job,
        training.steps * batch,
        training.steps,
        flops,
        rates,
        min(rate, rates["checkpoints"]),
        bytes_read,
        training_bytes(config, job),
        arithmetic,
        safety,
    )
