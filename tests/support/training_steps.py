"""Both training steps at a size that takes milliseconds, on micro-batches that are drawn instead of read."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL.Image import Image
from torch import nn

from vavae.data.image import png_bytes
from vavae.data.image_stream import ImageMicroBatch, MicroBatchKey
from vavae.distributed.world import World
from vavae.latents.features import feature_shape
from vavae.latents.statistics import LatentNormalizer
from vavae.latents.stream import LatentMicroBatch
from vavae.models.tokenizer.representation import load_encoder
from vavae.randomness import torch_generator
from vavae.runs.config import RunConfig
from vavae.runs.jobs import TRAININGS, Job
from vavae.storage.storage import Storage
from vavae.training.collapse import DISCRIMINATOR_ACCURACY
from vavae.training.diffusion_step import DiffusionStep
from vavae.training.step import Step, StepResult
from vavae.training.tokenizer_step import TokenizerStep

JOBS: tuple[Job, ...] = TRAININGS
LANES, CLASSES = 4, 3
BATCH = 2 * LANES
"""Two images in a micro-batch."""

_RUN: dict[str, Any] = {
    "name": "tiny",
    "shards": {"source": "digits", "image_size": 16},
    "stream": {"lanes": LANES},
    "tokenizer": {
        "latent_dim": 4, "channels": 32, "channel_multipliers": [1, 1], "res_blocks": 1, "attention_levels": [1],
    },
    "losses": {
        "perceptual": {"kind": "teacher_features"},
        "adversarial": {"start_images": 0, "channels": 32, "layers": 1},
        # Large enough to matter beside the reconstruction.
        "kl_weight": 1e-2,
    },
    "train_vavae": {"images": 1000, "batch_size": BATCH, "optimizer": {"learning_rate": 1e-3}, "ema_decay": 0.9},
    "lightningdit": {"size": None, "depth": 2, "width": 32, "heads": 2},
    "train_lightningdit": {"images": 1000, "batch_size": BATCH, "optimizer": {"learning_rate": 1e-3}, "ema_decay": 0.9},
}  # fmt: skip


def tiny_config(
    train_vavae: Mapping[str, Any] | None = None, losses: Mapping[str, Any] | None = None, **training: Any
) -> RunConfig:
    """The configuration, with some fields of both trainings replaced, then some of the tokenizer's and its losses."""
    sections = {job: {**_RUN[job], **training} for job in JOBS}
    sections["train_vavae"] |= train_vavae or {}
    sections["losses"] = {**_RUN["losses"], **(losses or {})}
    return RunConfig.model_validate({**_RUN, **sections})


class DrawnImages:
    """Random images, a function of lane and step."""

    def __getitem__(self, key: MicroBatchKey) -> ImageMicroBatch:
        """See `MicroBatchSource`."""
        generator = torch_generator(1, "images", *key)
        images = torch.randint(0, 256, (BATCH // LANES, 3, 16, 16), generator=generator, dtype=torch.uint8)
        return ImageMicroBatch(*key, images, torch.zeros(len(images), dtype=torch.int64))


class DrawnLatents:
    """Random posteriors, and features where they are asked for, a function of lane and step.

    Args:
        features: number and channels of the features of an image.
    """

    def __init__(self, features: tuple[int, int] | None = None) -> None:
        self._features = features

    def __getitem__(self, key: MicroBatchKey) -> LatentMicroBatch:
        """See `MicroBatchSource`."""
        generator = torch_generator(1, "latents", *key)
        mean = torch.randn(BATCH // LANES, 4, 8, 8, generator=generator)
        labels = torch.randint(0, CLASSES, (len(mean),), generator=generator)
        features = None
        if self._features is not None:
            features = torch.randn(len(mean), *self._features, generator=generator).bfloat16()
        return LatentMicroBatch(*key, mean, torch.full_like(mean, 0.1), labels, features)


def build_step(job: Job, config: RunConfig, world: World, awaits_checkpoint: bool = False) -> Step:
    """The step object of a training."""
    if job == "train_vavae":
        phase = config.tokenizer_phases()[0]
        images, encoder = DrawnImages(), load_encoder(config.tokenizer)
        return TokenizerStep(config, phase, None, images, world, awaits_checkpoint, encoder)  # type: ignore[arg-type]
    model = config.lightningdit.with_classes(CLASSES)
    normalizer = LatentNormalizer(torch.zeros(4), torch.ones(4))
    stored = config.latents.features
    latents = DrawnLatents(None if stored is None else feature_shape(stored, config.grid))
    return DiffusionStep(config, model, latents, normalizer, world, awaits_checkpoint)  # type: ignore[arg-type]


def figures_of(result: StepResult, world: World) -> dict[str, float]:
    """Terms of a step, means over the global batch, and its gradient norms."""
    return world.sum_terms(result.terms) | {name: norm.item() for name, norm in result.gradient_norms.items()}


def without_signs(row: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a row but for the share of logits of the right sign: rounding may turn the sign of one near zero."""
    return {name: value for name, value in row.items() if name != DISCRIMINATOR_ACCURACY}


def fill_empty_memory() -> None:
    """Let memory that nothing has set hold no number, in modules that are built without their values."""
    to_empty = nn.Module.to_empty

    def filled(module: nn.Module, *, device: torch.device) -> nn.Module:
        for tensor in to_empty(module, device=device).state_dict().values():
            tensor.fill_(math.nan if tensor.is_floating_point() else -1)
        return module

    nn.Module.to_empty = filled  # type: ignore[method-assign,assignment]


class Notes:
    """A log that keeps what it was told last."""

    row: Mapping[str, float] | None = None
    picture_name: str | None = None

    def add(self, images_seen: int, row: Mapping[str, float]) -> None:
        """See `MetricsLog.add`."""
        self.row = row

    def picture(self, images_seen: int, name: str, picture: Image, folder: Storage) -> None:
        """See `MetricsLog.picture`."""
        self.picture_name = name
        folder.write_bytes(f"{images_seen:012d}.png", png_bytes(picture))
