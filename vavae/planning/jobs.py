"""Estimates of what each job of a run takes on a cluster."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vavae.data.ahead import threads_of
from vavae.data.config import RGB
from vavae.diffusion.guidance import ClassifierFreeGuidance, guided_by_routing, within
from vavae.diffusion.solvers import solve
from vavae.distributed.config import Precision
from vavae.planning.cluster import ClusterSpec
from vavae.planning.formulas import (
    Arithmetic,
    accumulation_steps_of,
    arithmetic_of,
    exposed_seconds,
    peak_rate,
    step_traffic,
)
from vavae.planning.sizes import (
    feature_bytes,
    image_bytes,
    latent_bytes,
    muon_matrices,
    sample_bytes,
    trained_parameters,
    training_bytes,
)
from vavae.planning.training import TrainingEstimate, estimate_training, lanes_at_once
from vavae.runs.config import RunConfig
from vavae.runs.jobs import Job
from vavae.runs.training_config import TrainingConfig
from vavae.training.flops.flops import decoding_flops, encoding_flops, features_flops, training_flops, velocity_flops

_MEASURED_IMAGE_SIZE = 256
_DECODED_PER_SECOND = {"jpeg": 3000.0, "png": 400.0}
"""Images of 256 px that one core (AMD EPYC) decodes."""
_PREPARED_PER_SECOND = {"jpeg": 300.0, "png": 70.0}
"""Photographs of half a megapixel that one core decodes, scales to 256 px and encodes."""
_LATENTS_PER_SECOND = 130_000.0
"""Latents of 32 x 16 x 16 that one core gathers into batches; `vavae bench data`. Larger ones take as much longer."""
_MEASURED_LATENT = 2 * 32 * 16 * 16
"""Values of such a latent, mean and deviation."""
_BYTES_PER_PIXEL = {"jpeg": 0.8, "png": 1.85}
"""Mean size of photographs at the default quality."""


class Dataset(NamedTuple):
    """Description of the images, which need not be here."""

    images: int
    image_bytes: float | None = None
    """Mean size of a stored image; none takes what photographs have in the format of the shards."""


@dataclass(frozen=True)
class JobEstimate:
    """Estimate of one job."""

    job: Job
    images: int
    steps: int | None
    flops: float
    """FLOPs of one image, on average over the job."""
    rates: dict[str, float]
    """Images/s of all machines that each resource would allow by itself."""
    images_per_second: float
    """Expected rate of all machines, all resources together."""
    bytes_read: float
    """Bytes from the store for one image."""
    bytes_written: float
    """Bytes to the store in all."""
    arithmetic: Arithmetic | None = None
    """Arithmetic on GPUs; None where none is used."""
    training: TrainingEstimate | None = None
    """Memory and checkpoints of a training; None for other jobs."""
    bytes_sent: float = 0.0
    """Bytes that leave a worker in a step of a training, for gradients, weights and Muon's updates."""
    muon_flops: float = 0.0
    """FLOPs of Muon in a step of a training, of all workers together."""

    @property
    def hours(self) -> float:
        """Hours from start to end, with what checkpoints and failures cost."""
        lost = 0.0 if self.training is None else self.training.lost
        return self.images / self.images_per_second / (1 - lost) / 3600

    @property
    def bottleneck(self) -> str:
        """Resource that allows the fewest images/s."""
        return min(self.rates, key=self.rates.__getitem__)


def estimate_jobs(config: RunConfig, cluster: ClusterSpec, dataset: Dataset) -> list[JobEstimate]:
    """Estimate all jobs but `evaluate`."""
    return [
        _prepare(config, cluster, dataset),
        _train(config, cluster, "train_vavae", tokenizer_flops(config), stored_bytes(config, dataset)),
        _extract(config, cluster, dataset),
        _train(
            config,
            cluster,
            "train_lightningdit",
            lightningdit_flops(config),
            stored_bytes(config, dataset)
            if config.latents.online
            else latent_bytes(config) + (feature_bytes(config) if config.reads_features else 0),
        ),
        _sample(config, cluster),
    ]


def stored_bytes(config: RunConfig, dataset: Dataset) -> float:
    """Mean bytes of one image among the shards."""
    return dataset.image_bytes or _BYTES_PER_PIXEL[_image_format(config)] * image_bytes(config) / RGB.channels


def tokenizer_flops(config: RunConfig) -> float:
    """Mean FLOPs of one image in a training step of the tokenizer, over its phases, without and with adversary."""
    budget = config.train_vavae.images
    changes = {0, budget}
    for phase in config.tokenizer_phases():
        changes |= {phase.from_images, phase.losses.adversarial.start_images}
    mean = 0.0
    for start, end in pairwise(sorted(change for change in changes if change <= budget)):
        mean += training_flops(config, "train_vavae", start) * ((end - start) / budget)
    return mean


def lightningdit_flops(config: RunConfig) -> float:
    """Mean FLOPs of one image in a training step of the LightningDiT, while tokens skip blocks and after."""
    routing, budget = config.lightningdit.routing, config.train_lightningdit.images
    flops = training_flops(config, "train_lightningdit")
    if routing is None or routing.until_images is None or routing.until_images >= budget:
        return flops
    after = training_flops(config, "train_lightningdit", routing.until_images)
    return after + (flops - after) * (routing.until_images / budget)


class Evaluations(NamedTuple):
    """Evaluations of the LightningDiT for one sample."""

    whole: int
    """On all tokens."""
    without_path: int
    """Without the blocks that tokens skip, for guidance by path drop."""
    routed: int
    """With tokens that skip blocks, for guidance by routing."""


def velocity_evaluations(config: RunConfig) -> Evaluations:
    """Evaluations of the LightningDiT for the velocity of one sample, guidance included.

    A weaker model that guides counts as the LightningDiT itself, which is larger, once for each label.
    `dopri5` is counted on the flow between two equal Gaussians, v = (2t - 1) / (t² + (1 - t)²) x; images take it more.
    """
    if config.solver.name == "mean_flow":
        return Evaluations(config.solver.num_steps, 0, 0)
    guidance = ClassifierFreeGuidance(lambda x, t, y: x, 0, config.guidance)
    whole = null = routed = 0

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        nonlocal whole, null, routed
        weak = config.guidance.weak
        models = 2 if weak is not None and weak.scale != 1 and within(t, weak.interval).all() else 1
        active = int(guidance.active(t).sum())
        whole += models * len(x)
        null += active if config.guidance.path_drop else models * active
        routed += int(guided_by_routing(config.guidance, t).sum())
        return x * ((2 * t - 1) / (t**2 + (1 - t) ** 2)).view(-1, 1, 1, 1)

    noise = torch.ones(1, *config.latent_shape)
    labels, by_euler = torch.zeros(1, dtype=torch.int64), config.lightningdit.predicts_data
    solve(velocity, noise, labels, config.solver, guidance.jumps, ends_by_euler=by_euler)
    return Evaluations(whole, null, routed) if config.guidance.path_drop else Evaluations(whole + null, 0, routed)


def _image_format(config: RunConfig) -> str:
    """Format in which most images are stored."""
    return "jpeg" if config.shards.keep_original else config.shards.format


def _at_image_size(config: RunConfig, rate: float) -> float:
    """Images/s of a core at the run's image size, given the rate at the size that was measured."""
    return rate * _MEASURED_IMAGE_SIZE**2 / math.prod(config.shards.height_and_width)


def _store_rate(cluster: ClusterSpec, bytes_per_image: float) -> float:
    return cluster.nodes * cluster.store / bytes_per_image


def _prepare(config: RunConfig, cluster: ClusterSpec, dataset: Dataset) -> JobEstimate:
    written = stored_bytes(config, dataset)
    rates = {
        "encoding": cluster.count * _at_image_size(config, _PREPARED_PER_SECOND[_image_format(config)]),
        "store": _store_rate(cluster, written),
    }
    total = dataset.images * written
    return JobEstimate("prepare_shards", dataset.images, None, 0.0, rates, min(rates.values()), 0, total)


def _extract(config: RunConfig, cluster: ClusterSpec, dataset: Dataset) -> JobEstimate:
    """Estimate the extraction: an actor decodes in threads, one for each of its cores, while its GPU encodes."""
    features = config.latents.features is not None and not config.latents.online
    flops = (encoding_flops(config) + (features_flops(config) if features else 0.0)) * (1 + config.latents.flip)
    arithmetic = _arithmetic(config, config.latents.precision)
    computing = _gpu_seconds(flops, cluster, arithmetic)
    decoded = _at_image_size(config, _DECODED_PER_SECOND[_image_format(config)])
    threads = threads_of(config.latents.cpus or config.workers.cpus)
    actors = cluster.count / config.latents.gpus
    read, written = stored_bytes(config, dataset), latent_bytes(config) + feature_bytes(config)
    passes = 1 + features
    rates = {
        "compute": cluster.count / computing,
        "decoding": actors * threads * decoded / passes,
        "store": _store_rate(cluster, passes * read + written),
    }
    total, rate = dataset.images * written, min(rates.values())
    return JobEstimate("precompute_latents", dataset.images, None, flops, rates, rate, passes * read, total, arithmetic)


def _sample(config: RunConfig, cluster: ClusterSpec) -> JobEstimate:
    evaluations = velocity_evaluations(config)
    flops = velocity_flops(config) * evaluations.whole + decoding_flops(config)
    for count, drop in ((evaluations.without_path, 1.0), (evaluations.routed, config.guidance.routing_drop)):
        if count:
            flops += velocity_flops(config, drop) * count
    arithmetic = _arithmetic(config, config.sample.precision)
    rate = cluster.count / _gpu_seconds(flops, cluster, arithmetic)
    images, written = config.sample.images, sample_bytes(config)
    return JobEstimate("sample", images, None, flops, {"compute": rate}, rate, 0, written, arithmetic)


def _arithmetic(config: RunConfig, precision: Precision) -> Arithmetic:
    """Arithmetic of GPUs, of which the configuration may know nothing yet."""
    return arithmetic_of(precision, config.workers.model_copy(update={"use_gpu": True}).rounds_to_tf32)


def _gpu_seconds(flops: float, cluster: ClusterSpec, arithmetic: Arithmetic) -> float:
    """Seconds of so many FLOPs on one GPU."""
    return flops / peak_rate(cluster.gpu, arithmetic) / cluster.utilization


def _train(config: RunConfig, cluster: ClusterSpec, job: Job, flops: float, bytes_read: float) -> JobEstimate:
    training: TrainingConfig = getattr(config, job)
    lanes, batch = config.stream.lanes, training.batch_size
    images_of_a_gpu = accumulation_steps_of(lanes, cluster.count) * batch // lanes
    accumulation_steps = -(-accumulation_steps_of(lanes, cluster.count) // lanes_at_once(config, job, cluster))
    arithmetic = _arithmetic(config, training.precision)
    compute = images_of_a_gpu * _gpu_seconds(flops, cluster, arithmetic)
    parameters = sum(trained_parameters(config, job).values())
    muon = muon_matrices(config, job).values()
    updates = sum(matrices.update_bytes for matrices in muon)
    orthogonalizing = sum(
        _gpu_seconds(matrices.flops(cluster.count), cluster, _arithmetic(config, matrices.config.precision))
        for matrices in muon
    )
    traffic = step_traffic(parameters, cluster.count, training.engine, accumulation_steps, updates)
    readers = cluster.count * max(1, config.stream.workers)
    values = (2 if config.tokenizer.kind == "kl" else 1) * math.prod(config.latent_shape)
    decoded = (
        _LATENTS_PER_SECOND * min(1.0, _MEASURED_LATENT / values)
        if job == "train_lightningdit" and not config.latents.online
        else _at_image_size(config, _DECODED_PER_SECOND[_image_format(config)])
    )
    rates = {
        "compute": batch / (compute + orthogonalizing),
        "decoding": readers * decoded,
        "store": _store_rate(cluster, bytes_read),
    }
    if traffic.total:
        rates["network"] = batch * cluster.interconnect / traffic.total
    waiting = exposed_seconds(traffic, cluster.interconnect, compute, accumulation_steps)
    together = batch / (compute + orthogonalizing + waiting)
    rate = min(together, rates["decoding"], rates["store"])
    estimate = estimate_training(config, cluster, job, rate)
    rates["checkpoints"] = training.checkpoint_images / estimate.upload_seconds
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
        estimate,
        traffic.total,
        sum(matrices.flops(workers=1) for matrices in muon),
    )
