"""Memory of a training, and what its checkpoints cost and save."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from vavae.distributed.world import World
from vavae.losses.perceptual import LPIPS
from vavae.planning.activations import activation_bytes
from vavae.planning.cluster import ClusterSpec
from vavae.planning.formulas import (
    accumulation_steps_of,
    buffer_bytes,
    checkpoint_interval,
    lost_fraction,
    state_bytes,
)
from vavae.planning.sizes import FLOAT_BYTES, checkpoint_bytes, muon_matrices, trained_parameters
from vavae.runs.config import RunConfig
from vavae.runs.jobs import Job
from vavae.runs.training_config import TrainingConfig
from vavae.training.flops.meta_models import discriminator_network, frozen_encoder, frozen_networks, online_networks

_COPY_BYTES_PER_SECOND = 25e9
"""Rate from a GPU to the memory of its machine."""
_ZERO_STAGES = (0, 1, 2, 3)
_USABLE_MEMORY = 0.9
"""Share of a GPU's memory that activations may fill: the rest is for unused gaps, kernels and the CUDA context."""


@dataclass(frozen=True)
class TrainingEstimate:
    """Memory and checkpoints of one training."""

    parameters: int
    """Trained weights, of all engines."""
    memory: tuple[float, ...]
    """Bytes on a GPU in ZeRO stage 0 to 3, at most, with frozen networks, buckets and activations, nothing recomputed;
    stage 0 in the configured backend, and alone with Muon, which no other takes."""
    activations: float
    """Bytes among them for one backward pass."""
    checkpoint: int
    """Bytes of one checkpoint."""
    stall_seconds: float
    """Seconds that training waits for the copy in memory."""
    upload_seconds: float
    """Seconds until it is in the store, while training continues."""
    advised_seconds: float
    """Interval between checkpoints at which the least is lost and no checkpoint waits for the one before."""
    configured_seconds: float
    """Interval between checkpoints as `checkpoint_images` has it."""
    lost: float
    """Fraction of the time that goes into checkpoints and what failures make do again, as configured."""


def estimate_training(config: RunConfig, cluster: ClusterSpec, job: Job, images_per_second: float) -> TrainingEstimate:
    """Estimate memory and checkpoints of a training.

    Args:
        config: of the run.
        cluster: that it runs on.
        job: the training.
        images_per_second: rate of all machines together.
    """
    training: TrainingConfig = getattr(config, job)
    counts = trained_parameters(config, job)
    activations = _activations_of_a_lane(config, job) * lanes_at_once(config, job, cluster)
    zero_stages = _ZERO_STAGES[:1] if muon_matrices(config, job) else _ZERO_STAGES
    memory = tuple(_memory(config, job, cluster.count, zero_stage, activations) for zero_stage in zero_stages)
    size = checkpoint_bytes(config, job)
    stall, upload = size / cluster.count / _COPY_BYTES_PER_SECOND, size / cluster.nodes / cluster.store
    between_failures = cluster.hours_between_failures * 3600
    configured = training.checkpoint_images / images_per_second
    return TrainingEstimate(
        sum(counts.values()),
        memory,
        activations,
        size,
        stall,
        upload,
        max(upload, checkpoint_interval(stall, between_failures)),
        configured,
        lost_fraction(stall, configured, between_failures),
    )


@cache
def _activations_of_a_lane(config: RunConfig, job: Job) -> float:
    training: TrainingConfig = getattr(config, job)
    return activation_bytes(config, job, training.batch_size // config.stream.lanes)


def _memory(config: RunConfig, job: Job, workers: int, zero_stage: int, activations: float) -> float:
    """Bytes on a GPU in a ZeRO stage, with so many of activations."""
    training: TrainingConfig = getattr(config, job)
    averaged, offloaded = training.average_count, training.engine.offload_optimizer
    backend = training.engine.backend if zero_stage == 0 else "deepspeed"
    engine = training.engine.model_copy(update={"backend": backend, "zero_stage": zero_stage})
    counts = trained_parameters(config, job)
    of_muon = {name: matrices.numel for name, matrices in muon_matrices(config, job).items()}
    states = sum(
        state_bytes(
            count,
            workers,
            zero_stage,
            averaged=0 if i else averaged,
            offloaded=offloaded,
            of_muon=of_muon.get(name, 0),
        )
        for i, (name, count) in enumerate(counts.items())
    )
    buffers = [buffer_bytes(count, workers, engine) for count in counts.values()]
    in_backward, after = (sum(held) for held in zip(*buffers, strict=True))
    return frozen_bytes(config, job) + states + max(activations + in_backward, after)


def lanes_at_once(config: RunConfig, job: Job, cluster: ClusterSpec) -> int:
    """Lanes that a training takes in one pass on a cluster."""
    if job != "train_lightningdit":
        return 1
    of_a_worker = accumulation_steps_of(config.stream.lanes, cluster.count)
    asked = config.train_lightningdit.lanes_at_once
    return min(
        of_a_worker, lanes_that_fit(config, cluster.count, cluster.gpu.memory_bytes) if asked == "auto" else asked
    )


def lanes_that_fit(config: RunConfig, workers: int, memory_bytes: float) -> int:
    """Lanes of the LightningDiT in a pass, so that a GPU holds their activations in the fewest, equal passes."""
    job: Job = "train_lightningdit"
    engine = config.train_lightningdit.engine
    zero_stage = engine.zero_stage if engine.backend == "deepspeed" else 0
    of_a_worker = accumulation_steps_of(config.stream.lanes, workers)
    room = _USABLE_MEMORY * memory_bytes - _memory(config, job, workers, zero_stage, activations=0)
    fitting = max(1, min(int(room // _activations_of_a_lane(config, job)), of_a_worker))
    passes = -(-of_a_worker // fitting)
    return -(-of_a_worker // passes)


def resolve_lanes_at_once(config: RunConfig, world: World) -> RunConfig:
    """Resolve `train_lightningdit.lanes_at_once=auto` for the ranks of a training. Every rank calls it.

    Where bits are promised, on CPUs and with `workers.deterministic`, it is one.
    """
    if config.train_lightningdit.lanes_at_once != "auto":
        return config
    lanes = 1
    if world.device.type == "cuda" and not config.workers.deterministic:
        total = torch.cuda.get_device_properties(world.device).total_memory
        lanes = world.broadcast(lanes_that_fit(config, world.size, total) if world.is_first else None)
    training = config.train_lightningdit.model_copy(update={"lanes_at_once": lanes})
    return config.model_copy(update={"train_lightningdit": training})


def frozen_bytes(config: RunConfig, job: Job) -> int:
    """Bytes of the frozen networks on a GPU: teacher, encoder, VGG16 for LPIPS, and the discriminator's; or what
    encodes images for the LightningDiT.
    """
    networks = _tokenizer_networks(config) if job == "train_vavae" else []
    if job == "train_lightningdit" and config.latents.online:
        networks = online_networks(config)
    return FLOAT_BYTES * sum(parameter.numel() for network in networks for parameter in network.parameters())


def _tokenizer_networks(config: RunConfig) -> list[nn.Module]:
    """Frozen networks of the tokenizer's training."""
    teacher, perceptual = frozen_networks(config.teacher, config.losses.perceptual)
    networks: list[nn.Module] = [teacher.model]
    encoder = frozen_encoder(config.tokenizer)
    if encoder is not None:
        networks.append(encoder)
    if isinstance(perceptual, LPIPS):
        networks.append(perceptual.layers)
    judging = discriminator_network(config.losses.adversarial) if config.adversarial else None
    if judging is not None:
        networks.append(judging.model)
    return networks
