"""Sizes of what the jobs of a run write, in bytes, estimated before they run."""

import math
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from torch import nn

from vavae.data.shards.manifest import Manifest
from vavae.distributed.config import MuonConfig
from vavae.distributed.muon import MatrixShape, assign_by_cost, matrix_shapes
from vavae.latents.features import feature_shape
from vavae.losses.adversarial import build_discriminator
from vavae.models.tokenizer.representation import build_autoencoder
from vavae.runs.config import RunConfig
from vavae.runs.jobs import Job
from vavae.runs.training_config import LightningDiTTrainingConfig, TrainingConfig
from vavae.training.diffusion_step import FlowMatchingModel
from vavae.training.flops.meta_models import lightningdit_of, on_meta

FLOAT_BYTES = 4
HALF_BYTES = 2
_TAR_BYTES = 5 * 512
"""Overhead per latent: two headers, the label, and what rounds the array up to blocks."""
_TAR_BYTES_OF_FEATURES = 2 * 512
"""Overhead per image of its features, at most: a header, that of the array and what rounds it up to blocks."""
_ADAM_FLOATS = 3
"""Numbers per parameter in a checkpoint: the weight and two moments, of which Muon has one."""


def bytes_to_write(config: RunConfig, job: Job, manifest: Manifest | None) -> int | None:
    """Bytes that a job leaves in storage, at most; None where they can't be known before.

    Args:
        config: of the run.
        job: the job.
        manifest: of the image shards; None before there are any.
    """
    if job == "train_lightningdit" and manifest is not None:
        known = config.lightningdit.with_classes(len(manifest.classes))
        config = config.model_copy(update={"lightningdit": known})
    if job in ("train_vavae", "train_lightningdit"):
        return training_bytes(config, job)
    if job == "precompute_latents" and config.latents.online:
        return 0
    if job == "precompute_latents" and manifest is not None:
        features = manifest.count("train") * feature_bytes(config)
        return sum(map(manifest.count, manifest.splits)) * latent_bytes(config) + features
    return sample_bytes(config) if job == "sample" else None


def sample_bytes(config: RunConfig) -> int:
    """Bytes of all samples, at most: PNG takes less than their pixels, the file of all of them takes as much."""
    return config.sample.images * image_bytes(config) * (1 + config.sample.npz)


def image_bytes(config: RunConfig) -> int:
    """Bytes of the pixels of one image."""
    return math.prod(config.shards.height_and_width) * config.shards.channels * config.shards.depth // 8


def latent_bytes(config: RunConfig) -> int:
    """Bytes of one image among the latents: mean and deviation, or points, in float16, mirrored too where they are; 0
    where none are stored.
    """
    if config.latents.online:
        return 0
    values = (2 if config.tokenizer.kind == "kl" else 1) * (1 + config.latents.flip) * math.prod(config.latent_shape)
    return values * HALF_BYTES + _TAR_BYTES


def feature_bytes(config: RunConfig) -> int:
    """Bytes of one image among the features, mirrored too where latents are; 0 where none are stored."""
    stored = config.latents.features
    if stored is None or config.latents.online:
        return 0
    values = (1 + config.latents.flip) * math.prod(feature_shape(stored, config.grid))
    return values * HALF_BYTES + _TAR_BYTES_OF_FEATURES


@cache
def trained_parameters(config: RunConfig, job: Job) -> Mapping[str, int]:
    """Numbers of weights that a training optimizes, by engine; the one that is exported comes first."""
    return {engine: _parameters(module) for engine, module in _trained_modules(config, job).items()}


@cache
def _trained_modules(config: RunConfig, job: Job) -> Mapping[str, nn.Module]:
    """Networks that a training optimizes, without memory, by engine, whose names of weights they have."""
    if job == "train_lightningdit":
        return {"lightningdit": on_meta(lambda: FlowMatchingModel.of(config, lightningdit_of(config)))}
    found: dict[str, nn.Module] = {
        "generator": nn.ModuleDict({"autoencoder": on_meta(lambda: build_autoencoder(config.tokenizer))})
    }
    if config.adversarial:
        judge = on_meta(lambda: build_discriminator(config.losses.adversarial, config.shards.channels))
        found["discriminator"] = nn.ModuleDict({"discriminator": judge})
    return found


class MuonMatrices(NamedTuple):
    """Weights of an engine that Muon updates."""

    shapes: tuple[MatrixShape, ...]
    config: MuonConfig

    @property
    def numel(self) -> int:
        """Number of values."""
        return sum(shape.numel for shape in self.shapes)

    @property
    def update_bytes(self) -> int:
        """Bytes of their updates, as the ranks exchange them."""
        return self.numel * (HALF_BYTES if self.config.precision == "bf16" else FLOAT_BYTES)

    def flops(self, workers: int) -> float:
        """FLOPs of orthogonalizing them in a step, of the worker that has most to do."""
        costs = [shape.flops(self.config.iterations) for shape in self.shapes]
        return max(sum(costs[index] for index in part) for part in assign_by_cost(costs, workers))


@cache
def muon_matrices(config: RunConfig, job: Job) -> Mapping[str, MuonMatrices]:
    """Weights that Muon updates in a training, by engine; without those whose optimizer is AdamW alone.

    Raises:
        UserError: see `matrix_shapes`.
    """
    found = {}
    for engine, module in _trained_modules(config, job).items():
        of_discriminator = engine == "discriminator"
        muon = (config.train_vavae.of_discriminator if of_discriminator else getattr(config, job).optimizer).muon
        if muon is not None:
            shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
            found[engine] = MuonMatrices(tuple(matrix_shapes(shapes, muon).values()), muon)
    return found


def checkpoint_bytes(config: RunConfig, job: Job) -> int:
    """Bytes of one checkpoint: weights and moments of all engines, and the averages of the first."""
    training: TrainingConfig = getattr(config, job)
    first, *others = trained_parameters(config, job).values()
    of_muon = sum(matrices.numel for matrices in muon_matrices(config, job).values())
    return FLOAT_BYTES * (first * (_ADAM_FLOATS + training.average_count) + sum(others) * _ADAM_FLOATS - of_muon)


def training_bytes(config: RunConfig, job: Job) -> int:
    """Bytes of the checkpoints and snapshots that a training keeps, and of its exports."""
    training: TrainingConfig = getattr(config, job)
    exported = next(iter(trained_parameters(config, job).values()))
    kept = training.keep_checkpoints + (training.keep_best.count if training.keep_best else 0)
    copies = 1
    if isinstance(training, LightningDiTTrainingConfig):
        interval = training.average_snapshot_images
        snapshots = 0 if interval is None else training.steps * training.batch_size // interval
        kept += len(training.keep_images)
        copies += len(training.averages) + snapshots * len(training.power_averages)
    return kept * checkpoint_bytes(config, job) + FLOAT_BYTES * exported * copies


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
