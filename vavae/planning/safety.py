"""What a training holds in memory, and what its checkpoints cost and save."""

from dataclasses import dataclass

from torch import nn

from vavae.models.backbones.load import meta_backbone
from vavae.planning.activations import activation_bytes
from vavae.planning.estimate import FLOAT_BYTES, checkpoint_bytes, trained_parameters
from vavae.planning.formulas import checkpoint_interval, lost_share, state_bytes
from vavae.planning.offer import Offer
from vavae.runs.config import RunConfig, TrainingConfig
from vavae.runs.run import Job

_COPY = 25e9
"""Bytes/s from a GPU to the memory of its machine."""
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Safety:
    """Of one training."""

    parameters: int
    """Trained weights, of all engines."""
    memory: tuple[float, ...]
    """Bytes on a GPU in ZeRO stage 0 to 3, at most, with frozen networks and activations, nothing recomputed."""
    activations: float
    """Bytes among them for the backward pass of one micro-batch."""
    checkpoint: int
    """Bytes of one checkpoint."""
    stall_seconds: float
    """That training waits for the copy in memory."""
    upload_seconds: float
    """Until it is in the store, beside training."""
    advised_seconds: float
    """Between two checkpoints, at which the least is lost, and no checkpoint waits for the one before."""
    configured_seconds: float
    """Between two checkpoints as `checkpoint_images` has it."""
    lost: float
    """Share of the time that goes into checkpoints, and into what failures make do again, as configured."""


def safety_of(config: RunConfig, offer: Offer, job: Job, images_per_second: float) -> Safety:
    """Of a training at a rate of images/s over all machines."""
    training: TrainingConfig = getattr(config, job)
    counts = trained_parameters(config, job)
    averaged, offloaded = training.ema_decay is not None, training.engine.offload_optimizer
    activations = activation_bytes(config, job, training.batch_size // config.stream.lanes)
    memory = tuple(
        activations
        + frozen_bytes(config, job)
        + sum(
            state_bytes(count, offer.count, stage, averaged=averaged and not i, offloaded=offloaded)
            for i, count in enumerate(counts.values())
        )
        for stage in ZERO_STAGES
    )
    size = checkpoint_bytes(config, job)
    stall, upload = size / offer.count / _COPY, size / offer.nodes / offer.store
    between_failures = offer.hours_between_failures * 3600
    configured = training.checkpoint_images / images_per_second
    return Safety(
        sum(counts.values()),
        memory,
        activations,
        size,
        stall,
        upload,
        max(upload, checkpoint_interval(stall, between_failures)),
        configured,
        lost_share(stall, configured, between_failures),
    )


def frozen_bytes(config: RunConfig, job: Job) -> int:
    """Of the networks on a GPU that only look: the teacher, and VGG16 for LPIPS."""
    if job != "train_vavae":
        return 0
    networks: list[nn.Module] = [meta_backbone(config.teacher.backbone)]
    if config.losses.perceptual.kind == "lpips" and config.losses.perceptual.weight > 0:
        networks.append(meta_backbone(config.losses.perceptual.backbone).features)  # type: ignore[arg-type]
    return FLOAT_BYTES * sum(parameter.numel() for network in networks for parameter in network.parameters())
