"""How much the stages of a run will write, before they run."""

from collections.abc import Callable

import torch
from torch import nn

from vavae.data.manifest import read_manifest
from vavae.dit.model import LightningDiT
from vavae.tokenizer.autoencoder import VAVAE
from vavae.training.config import TrainingConfig
from vavae.training.run import Job, Run

_FLOAT_BYTES = 4
_HALF_BYTES = 2
_TAR_BYTES = 5 * 512
"""Per latent: two headers, the label, and what rounds the array up to blocks."""
_ADAM_FLOATS = 3
"""Per parameter in a checkpoint: the weight and two moments."""


def bytes_to_write(run: Run, job: Job) -> int | None:
    """Bytes that a job leaves in storage, at most; None where they can't be known before."""
    config = run.config
    manifest = read_manifest(run.storage, run.prefix("prepare_shards")) if run.artefact("prepare_shards") else None
    if job == "train_vavae":
        return _training_bytes(config.train_vavae, lambda: VAVAE(config.tokenizer))
    if job == "train_lightningdit":
        model = config.lightningdit.with_classes(
            len(manifest.classes) if manifest else config.lightningdit.classes or 1
        )
        return _training_bytes(
            config.train_lightningdit, lambda: LightningDiT(model, config.tokenizer.latent_dim, config.grid)
        )
    if job == "precompute_latents" and manifest is not None:
        values = 2 * (1 + config.latents.flip) * config.tokenizer.latent_dim * config.grid**2
        return sum(map(manifest.count, manifest.splits)) * (values * _HALF_BYTES + _TAR_BYTES)
    if job == "sample":
        return config.sample.images * 3 * config.shards.image_size**2 * (1 + config.sample.npz)
    return None


def _training_bytes(config: TrainingConfig, build: Callable[[], nn.Module]) -> int:
    """The export and the checkpoints that are kept."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build().parameters())
    checkpoint = _ADAM_FLOATS + (config.ema_decay is not None)
    return parameters * _FLOAT_BYTES * (1 + config.keep_checkpoints * checkpoint)
