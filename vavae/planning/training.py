"""Memory of a training, and what its checkpoints cost and save."""

from dataclasses import dataclass

from torch import nn

from vavae.losses.perceptual import LPIPS
from vavae.planning.activations import activation_bytes
from vavae.planning.cluster import ClusterSpec
from vavae.planning.formulas import buffer_bytes, checkpoint_interval, lost_fraction, state_bytes
from vavae.planning.sizes import FLOAT_BYTES, checkpoint_bytes, trained_parameters
from vavae.runs.config import RunConfig, TrainingConfig
from vavae.runs.run import Job
from vavae.training.flops.meta_models import frozen_networks

_COPY_BYTES_PER_SECOND = 25e9
"""Rate from a GPU to the memory of its machine."""
_ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class TrainingEstimate:
    """Memory and checkpoints of one training."""

    parameters: int
    """Trained weights, of all engines."""
    memory: tuple[float, ...]
    """Bytes on a GPU in ZeRO stage 0 to 3, at most, with frozen networks, buckets and activations, nothing recomputed;
    stage 0 in the configured backend."""
    activations: float
    """Bytes among them for the backward pass of one micro-batch."""
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
    averaged, offloaded = training.ema_decay is not None, training.engine.offload_optimizer
    activations = activation_bytes(config, job, training.batch_size // config.stream.lanes)
    frozen = frozen_bytes(config, job)

    def memory_in(zero_stage: int) -> float:
        backend = training.engine.backend if zero_stage == 0 else "deepspeed"
        engine = training.engine.model_copy(update={"backend": backend, "zero_stage": zero_stage})
        states = sum(
            state_bytes(count, cluster.count, zero_stage, averaged=averaged and not i, offloaded=offloaded)
            for i, count in enumerate(counts.values())
        )
        buffers = [buffer_bytes(count, cluster.count, engine) for count in counts.values()]
        in_backward, after = (sum(held) for held in zip(*buffers, strict=True))
        return frozen + states + max(activations + in_backward, after)

    memory = tuple(map(memory_in, _ZERO_STAGES))
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


def frozen_bytes(config: RunConfig, job: Job) -> int:
    """Bytes of the frozen networks on a GPU: the teacher, and VGG16 for LPIPS."""
    if job != "train_vavae":
        return 0
    teacher, perceptual = frozen_networks(config.teacher, config.losses.perceptual)
    networks: list[nn.Module] = [teacher.model]
    if isinstance(perceptual, LPIPS):
        networks.append(perceptual.layers)
    return FLOAT_BYTES * sum(parameter.numel() for network in networks for parameter in network.parameters())
