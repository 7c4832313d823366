"""Floating-point operations per image: the networks and steps themselves are run on tensors without memory.

What is counted are multiplications and additions of convolutions and matrix products, two for each pair (Kaplan et al.,
arXiv 2001.08361, count likewise); norms, activations and optimizers are left out, as in published utilizations.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from statistics import fmean

import torch
from numpy.polynomial import Polynomial
from torch.nn.attention import SDPBackend, sdpa_kernel

from vavae.config import Config
from vavae.latents.features import token_grid
from vavae.losses.config import EquivarianceConfig
from vavae.losses.latents import UNTRANSFORMED, MicroBatchTransforms, Transform
from vavae.models.backbones.load import meta_backbone
from vavae.models.tokenizer.representation import build_autoencoder
from vavae.models.tokenizer.teacher import VisionFoundationTeacher
from vavae.runs.config import RunConfig
from vavae.runs.jobs import Job
from vavae.runs.phases import TokenizerPhase
from vavae.training.flops.meta_models import (
    MetaModel,
    frozen_encoder,
    images_of,
    lightningdit_step,
    on_meta,
    present,
    tokenizer_step,
    velocity,
)


def training_flops(config: RunConfig, job: Job, images_seen: int = 0, *, recompute: bool = False) -> float:
    """FLOPs of one image in a training step: forward and backward of all that the step runs, frozen networks too.

    Args:
        config: configuration of the run.
        job: `train_vavae` or `train_lightningdit`.
        images_seen: position in the training; it decides about the tokenizer's phase and adversary, and about tokens
            that skip blocks.
        recompute: count what `checkpoint_activations` computes again too; utilization leaves it out.
    """
    if not recompute:
        config = _without_recomputation(config)
    if job == "train_lightningdit":
        routing = config.lightningdit.routing
        config = with_drop(config, 0.0 if routing is None else routing.drop_at(images_seen))
        mean_flow = config.objective.mean_flow

        def count(spanning: int) -> int:
            return over_depth(config, lambda shallow: _count(lightningdit_step(shallow, 1, spanning)))

        frozen = _online_flops(config, images_seen) if config.latents.online else 0.0
        if mean_flow is None:
            return frozen + count(0)
        return frozen + mean_flow.equal_fraction * count(0) + (1 - mean_flow.equal_fraction) * count(1)
    assert job == "train_vavae", f"{job} trains nothing"
    phases = config.tokenizer_phases(images_seen + 1)
    phase = next(phase for phase in phases if images_seen < phase.until_images)
    adversarial, every = phase.losses.adversarial, phase.losses.adaptive.every
    adversary = adversarial.weight > 0 and images_seen >= adversarial.start_images

    def mean(measure_weights: bool) -> float:
        count = partial(
            _count_tokenizer_step, config, _without_magnitudes(phase), adversary, measure_weights=measure_weights
        )
        return _mean_over_transforms(phase.losses.equivariance, config.grid, count)

    return mean(True) if every == 1 else (mean(True) + mean(False) * (every - 1)) / every


def _online_flops(config: RunConfig, images_seen: int) -> float:
    """FLOPs of encoding one image, and of its features where they are needed, in the training of the LightningDiT."""
    steps = config.feature_steps
    needs_features = steps is not None and images_seen < steps * config.train_lightningdit.batch_size
    return encoding_flops(config) + (features_flops(config) if needs_features else 0.0)


def encoding_flops(config: RunConfig) -> float:
    """FLOPs of encoding one image, without gradients."""
    encoder = frozen_encoder(config.tokenizer)
    model = on_meta(lambda: build_autoencoder(config.tokenizer, encoder))
    return _count(MetaModel(lambda: model.encode(images_of(config, 1)), present(model, encoder)))


def features_flops(config: RunConfig) -> float:
    """FLOPs of the features of one image that belong to its latent; 0 where there are none."""
    stored = config.latents.features
    if stored is None:
        return 0.0
    teacher = on_meta(lambda: VisionFoundationTeacher(stored.teacher, meta_backbone))
    grid = token_grid(stored, config.grid)
    return _count(MetaModel(lambda: teacher(images_of(config, 1), grid), (teacher,)))


def decoding_flops(config: RunConfig) -> float:
    """FLOPs of decoding one latent, without gradients."""
    model = on_meta(lambda: build_autoencoder(config.tokenizer))
    return _count(MetaModel(lambda: model.decode(torch.empty(1, *config.latent_shape)), (model,)))


def velocity_flops(config: RunConfig, drop: float = 0.0) -> float:
    """FLOPs of one evaluation of the LightningDiT for one latent, without gradients.

    Args:
        config: configuration of the run.
        drop: share of the tokens that skip the blocks of `lightningdit.routing`.
    """
    return over_depth(with_drop(config, drop), lambda shallow: _count(velocity(shallow)))


def with_drop(config: RunConfig, drop: float) -> RunConfig:
    """The configuration of a LightningDiT of which such a share of the tokens skips blocks; 0 is none, 1 all."""
    routing = config.lightningdit.routing
    if routing is None:
        return config
    update = {"routing": routing.model_copy(update={"drop": drop})}
    return config.model_copy(update={"lightningdit": config.lightningdit.model_copy(update=update)})


def over_depth(config: RunConfig, count: Callable[[RunConfig], int]) -> int:
    """Count something of the LightningDiT to which each block adds as much, at a depth of one and of two.

    Blocks that tokens skip add something else each, and something together: they are counted at two and at three.
    """
    depth, routing = config.lightningdit.shape.depth, config.lightningdit.routing
    one, two = (count(_with_depth(config, shallow)) for shallow in (1, 2))
    if routing is None:
        return one + (depth - 1) * (two - one)
    routed, another = (count(_with_depth(config, shallow, shallow - 1)) for shallow in (2, 3))
    skipped = len(routing.blocks)
    return routed + (skipped - 1) * (another - routed) + (depth - 1 - skipped) * (two - one)


def _with_depth(config: RunConfig, depth: int, routed: int = 0) -> RunConfig:
    """A configuration of another depth, in which all that comes after an inner block comes after the first.

    Tokens skip so many blocks after that one.
    """
    model, objective = config.lightningdit, config.objective
    head = model.intermediate_head and model.intermediate_head.model_copy(update={"after_block": 1})
    skipped = {"first_block": 1, "last_block": routed}
    routing = model.routing.model_copy(update=skipped) if model.routing and routed else None
    shallow = model.model_copy(update={"depth": depth, "intermediate_head": head, "routing": routing})
    changed: dict[str, Config] = {"lightningdit": shallow}
    if objective.representation is not None:
        representation = objective.representation.model_copy(update={"after_block": 1})
        changed["objective"] = objective.model_copy(update={"representation": representation})
    return config.model_copy(update=changed)


@cache
def _count_tokenizer_step(
    config: RunConfig,
    phase: TokenizerPhase,
    adversary: bool,
    transforms: MicroBatchTransforms,
    *,
    measure_weights: bool,
) -> float:
    # With as many images as `activation_bytes` takes, so that operators are asked once for both.
    images = config.train_vavae.batch_size // config.stream.lanes
    step = tokenizer_step(
        config, phase, images, adversary=adversary, measure_weights=measure_weights, transforms=transforms
    )
    return _count(step) / images


def _mean_over_transforms(
    equivariance: EquivarianceConfig | None, grid: tuple[int, int], count: Callable[[MicroBatchTransforms], float]
) -> float:
    """Mean FLOPs of an image over all transforms.

    Of many sizes the smallest, one in the middle and the whole are counted, and a parabola in the area laid through
    them: convolutions grow with the area, attention with its square. Edges without padding, which have their own share
    in a patch discriminator, make less than a thousandth of a difference.
    """
    whole = count(UNTRANSFORMED)
    if equivariance is None:
        return whole
    grids = equivariance.grids(grid)
    counted = sorted({0, len(grids) // 2})
    areas = [math.prod(each) / math.prod(grid) for each in grids]

    def resized(transforms: Callable[[Transform], MicroBatchTransforms]) -> float:
        flops = [*(count(transforms(Transform(grids[index]))) for index in counted), whole]
        parabola = Polynomial.fit([*(areas[index] for index in counted), 1.0], flops, deg=len(counted))
        return fmean(map(parabola, areas))

    of_latents = equivariance.probability
    of_images = (1 - of_latents) * equivariance.small_images
    mean = (1 - of_latents - of_images) * whole
    if of_latents:
        mean += of_latents * resized(lambda transform: MicroBatchTransforms(latents=transform))
    if of_images:
        mean += of_images * resized(lambda transform: MicroBatchTransforms(images=transform))
    return mean


def _without_magnitudes(phase: TokenizerPhase) -> TokenizerPhase:
    """Give phases that differ in nothing but times, margins and weights above zero, which cost alike, one form.

    How often images are transformed is left out, too.
    """
    alignment = phase.losses.vision_foundation
    plain = {"weight": float(alignment.weight > 0), "cos_margin": 0.0, "distmat_margin": 0.0}
    losses = phase.losses.model_copy(
        update={"vision_foundation": alignment.model_copy(update=plain), "equivariance": None}
    )
    return TokenizerPhase(0, 0, losses, phase.frozen)


def _count(task: MetaModel) -> int:
    """Count the FLOPs of some work, attention as plain matrix products: the counter knows those on every device."""
    with task.ready() as work, sdpa_kernel(SDPBackend.MATH):
        return work()


def _without_recomputation(config: RunConfig) -> RunConfig:
    sections = {name: getattr(config, name) for name in ("tokenizer", "lightningdit")}
    plain = {name: section.model_copy(update={"checkpoint_activations": False}) for name, section in sections.items()}
    return config.model_copy(update=plain)
