"""Released weights and latents into a run, and a run's out: ``vavae import`` and ``vavae export``."""

import logging
from collections.abc import Mapping
from pathlib import PurePosixPath

from torch import Tensor

from vavae.config import Config, digest
from vavae.data.shards.manifest import read_manifest
from vavae.errors import UserError
from vavae.interop.checkpoint_file import WeightsFile, read_weights
from vavae.interop.diffusers_tokenizer import save_diffusers_tokenizer
from vavae.interop.export import (
    ALIGNMENT,
    WEIGHTS,
    LightningDiTDescription,
    TokenizerDescription,
    load_alignment,
    load_lightningdit,
    load_tokenizer,
    save_export,
)
from vavae.interop.released_latents import export_released_latents, import_released_latents
from vavae.interop.released_lightningdit import convert_lightningdit, save_released_lightningdit
from vavae.interop.released_tokenizer import (
    convert_alignment,
    convert_tokenizer,
    holds_alignment,
    save_released_tokenizer,
)
from vavae.latents.manifest import read_latent_manifest
from vavae.losses.vision_foundation import VisionFoundationLoss
from vavae.models.tokenizer.teacher import teacher_geometry
from vavae.runs.config import RunConfig
from vavae.runs.run import IMPORTED, JOBS, TRAININGS, Job, Run
from vavae.storage.artifact import FileInfo, commit, discard
from vavae.storage.storage import sha256_of

SPLIT = "train"
_log = logging.getLogger(__name__)


def import_tokenizer(run: Run, path: str) -> None:
    """Make a released tokenizer the run's own, as if it had been trained here; later stages take it as done.

    Without a projection in the file there is none in the run, and its evaluation leaves the alignment out.

    Raises:
        UserError: the file can't be used (see :mod:`vavae.interop.released_tokenizer`) or has other sizes than the
            configuration, the run has a tokenizer of its own, or there are no image shards yet.
    """
    _refuse_to_replace(run, "train_vavae")
    config, weights = run.config, read_weights(path)
    states = {WEIGHTS: convert_tokenizer(weights, config.tokenizer.model_dump(), "tokenizer.").state_dict()}
    feature_dim = teacher_geometry(config.teacher).feature_dim
    if holds_alignment(weights):
        states[ALIGNMENT] = _alignment(config, weights, feature_dim).state_dict()
    else:
        _log.warning("%s: no linear_proj; the evaluation of this run leaves the alignment out", weights.url)
    description = TokenizerDescription(
        tokenizer=config.tokenizer,
        teacher=config.teacher,
        vision_foundation=config.losses.vision_foundation,
        feature_dim=feature_dim,
    )
    _put(run, "train_vavae", weights, description, states)


def import_lightningdit(run: Run, path: str) -> None:
    """Make a released LightningDiT the run's own, as if it had been trained here on the run's latents.

    It samples with the run's statistics of the latents. Those that it was trained with come from 10,000 images; where
    they have to be the same to the last digit, import the latents too.

    Raises:
        UserError: as :func:`import_tokenizer`; or there are no latents yet.
    """
    _refuse_to_replace(run, "train_lightningdit")
    run.require("precompute_latents")
    manifest = read_latent_manifest(run.storage.child(run.prefix("precompute_latents")))
    model = run.config.lightningdit.with_classes(len(manifest.classes))
    latent_dim, grid, _ = manifest.shape
    weights = read_weights(path)
    settings = {**model.model_dump(), "latent_dim": latent_dim, "grid": grid}
    states = {WEIGHTS: convert_lightningdit(weights, settings, "lightningdit.").state_dict()}
    description = LightningDiTDescription(
        lightningdit=model, latent_dim=latent_dim, grid=grid, tokenizer=manifest.tokenizer
    )
    _put(run, "train_lightningdit", weights, description, states)


def import_latents(run: Run, folder: str) -> None:
    """Make latents in the public layout those of the run, in place of encoding its training images.

    They are of the run's tokenizer, and of classes in the order of its image shards; nothing in them tells.

    Raises:
        UserError: they have another shape than the configured tokenizer's, the run has computed latents of its own, or
            there is no tokenizer yet.
    """
    job: Job = "precompute_latents"
    config = run.config
    tokenizer = run.require("train_vavae").digest
    _refuse_to_replace(run, job)
    if not config.latents.flip:
        raise UserError(f"{folder}: the public layout holds mirror images too, so set latents.flip=true")
    classes = read_manifest(run.storage, run.prefix("prepare_shards")).classes
    target, source = run.storage.child(run.prefix(job)), run.storage.at(folder)
    shape = (config.tokenizer.latent_dim, config.grid, config.grid)
    discard(run.storage, run.prefix(job))
    import_released_latents(source, target, SPLIT, shape, tokenizer, classes, config.shards.shard_images)
    files = {
        name: FileInfo(bytes=size, sha256=sha256_of(target.local_file(name))) for name, size in target.sizes().items()
    }
    _commit(run, job, files, source.url())


def export_tokenizer(run: Run, path: str) -> None:
    """Write the run's tokenizer and its projection as a released checkpoint.

    Raises:
        UserError: there is no tokenizer yet, or the file can't be written.
    """
    files = run.require("train_vavae").files
    export = run.storage.child(run.prefix("train_vavae"))
    autoencoder, _ = load_tokenizer(export)
    save_released_tokenizer(path, autoencoder, load_alignment(export) if ALIGNMENT in files else None)


def export_diffusers_tokenizer(run: Run, folder: str) -> None:
    """Write the run's tokenizer as a folder for diffusers.

    Raises:
        UserError: there is no tokenizer yet, or diffusers has no such architecture.
    """
    run.require("train_vavae")
    autoencoder, _ = load_tokenizer(run.storage.child(run.prefix("train_vavae")))
    save_diffusers_tokenizer(folder, autoencoder, run.config.shards.image_size)


def export_lightningdit(run: Run, path: str) -> None:
    """Write the run's LightningDiT as a released checkpoint.

    Raises:
        UserError: there is no LightningDiT yet, or the file can't be written.
    """
    run.require("train_lightningdit")
    model, _ = load_lightningdit(run.storage.child(run.prefix("train_lightningdit")))
    save_released_lightningdit(path, model)


def export_latents(run: Run, folder: str) -> None:
    """Write the run's latents of its training images and their statistics in the public layout.

    Raises:
        UserError: there are no latents yet, or they are without mirror images.
    """
    run.require("precompute_latents")
    latents = run.storage.child(run.prefix("precompute_latents"))
    export_released_latents(latents, SPLIT, run.storage.at(folder), run.config.seed)


def _alignment(config: RunConfig, weights: WeightsFile, feature_dim: int) -> VisionFoundationLoss:
    """The projection of a file, once it is found to lead to the features of the configured teacher."""
    settings = {**config.losses.vision_foundation.model_dump(), "latent_dim": config.tokenizer.latent_dim}
    alignment = convert_alignment(weights, settings, "losses.vision_foundation.")
    shape = list(alignment.projection.weight.shape)
    side = 0 if alignment.config.projection == "latent_to_teacher" else 1
    if shape[side] != feature_dim:
        expected = [*shape[:side], feature_dim, *shape[side + 1 :]]
        raise UserError(
            f"{weights.url}: linear_proj.weight is {shape}, expected {expected} with "
            f"teacher.name={config.teacher.name}: name the teacher that this tokenizer was aligned with"
        )
    return alignment


def _refuse_to_replace(run: Run, job: Job) -> None:
    """Keep what was made here: what took days is not overwritten by a command of minutes."""
    record = run.artifact(job)
    begun = job in TRAININGS and run.storage.exists(f"{run.training_prefix(job)}/checkpoints")
    if begun or (record is not None and IMPORTED not in record.details):
        raise UserError(f"{run.storage.url()} has its own {JOBS[job].makes}; give the run another name")


def _put(
    run: Run, job: Job, weights: WeightsFile, description: Config, states: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write and commit the export of a training that took place elsewhere."""
    discard(run.storage, run.prefix(job))
    files = save_export(run.storage.child(run.prefix(job)), description, states)
    _commit(run, job, files, weights.url)


def _commit(run: Run, job: Job, files: Mapping[str, FileInfo], url: str) -> None:
    content = digest({name: info.sha256 for name, info in files.items()})
    commit(run.storage, run.prefix(job), run.record(job, content, files, **{IMPORTED: PurePosixPath(url).name}))
