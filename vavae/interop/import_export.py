"""Import of released weights and latents into a run, and export out of it: ``vavae import``, ``vavae export``."""

import json
import logging
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor

from vavae.config import Config, differences, digest, identity, is_hub_address
from vavae.data.shards.manifest import read_manifest
from vavae.errors import UserError
from vavae.interop.checkpoint_file import WeightsFile, read_weights
from vavae.interop.diffusers_lightningdit import (
    load_diffusers_lightningdit,
    save_diffusers_lightningdit,
)
from vavae.interop.diffusers_tokenizer import (
    save_diffusers_tokenizer,
)
from vavae.interop.export import (
    ALIGNMENT,
    DESCRIPTION,
    WEIGHTS,
    LightningDiTDescription,
    TokenizerDescription,
    load_alignment,
    load_exported_lightningdit,
    load_exported_tokenizer,
    save_export,
)
from vavae.interop.load import fetch_model, find_model, read_published_tokenizer
from vavae.interop.released_latents import (
    check_released_latents,
    export_released_latents,
    import_released_latents,
)
from vavae.interop.released_lightningdit import convert_lightningdit, save_released_lightningdit
from vavae.interop.released_tokenizer import (
    PublishedTokenizer,
    convert_alignment,
    convert_tokenizer,
    holds_alignment,
    save_released_tokenizer,
)
from vavae.latents.manifest import LatentManifest, read_latent_manifest
from vavae.latents.statistics import STATISTICS, read_statistics
from vavae.losses.vision_foundation import VisionFoundationLoss
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.teacher import teacher_geometry
from vavae.runs.config import RunConfig
from vavae.runs.files import CONFIG
from vavae.runs.output import JobOutput
from vavae.runs.run import IMPORTED, Run, StoredArtifact
from vavae.storage.artifact import FileInfo
from vavae.storage.storage import Storage, sha256_of

SPLIT = "train"
_log = logging.getLogger(__name__)


def import_tokenizer(config: RunConfig, output: JobOutput, path: str) -> None:
    """Make a released tokenizer the run's own, as if it had been trained here; later jobs take it as done.

    Without a projection in the file there is none in the run, and its evaluation leaves the alignment out.

    Args:
        config: configuration of the run.
        output: place of the tokenizer's export.
        path: local path or storage URL of a released file, of a folder of diffusers, of an export or a run; or
            `hf-hub:owner/name[/path][@revision]` of one.

    Raises:
        UserError: the file can't be used (see :mod:`vavae.interop.released_tokenizer` and
            :mod:`vavae.interop.diffusers_tokenizer`), has other sizes than the configuration, or lacks the statistics
            that `latents.normalization` asks for.
    """
    if config.tokenizer.kind != "kl":
        raise UserError(
            f"{path}: a released tokenizer is of kind kl, and tokenizer.kind={config.tokenizer.kind}: set kl"
        )
    tokenizer = read_published_tokenizer(path)
    weights, statistics = tokenizer.weights, tokenizer.statistics
    _check_architecture(config, tokenizer)
    states = {WEIGHTS: convert_tokenizer(weights, config.tokenizer.model_dump(), "tokenizer.").state_dict()}
    takes_given = config.latents.normalization == "tokenizer"
    if statistics is not None:
        states[STATISTICS] = dict(statistics)
        if not takes_given:
            instead = "the images' own" if config.latents.scale is None else f"latents.scale={config.latents.scale:g}"
            _log.warning(
                "%s: its statistics of latents (%s) are kept, but the diffusion takes %s; "
                "latents.normalization=tokenizer takes these",
                weights.url,
                tokenizer.statistics_source,
                instead,
            )
    elif takes_given:
        raise UserError(f"{weights.url}: no statistics of its latents: set latents.normalization=measured")
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
    _write_export(output, path if is_hub_address(path) else Storage(path).url(), description, states)


def import_lightningdit(config: RunConfig, latents: Storage, output: JobOutput, path: str) -> None:
    """Make a released LightningDiT the run's own, as if it had been trained here on the run's latents.

    It samples with the run's statistics of the latents. Those that it was trained with come from 10,000 images; where
    they have to be the same to the last digit, import the latents too.

    Args:
        config: configuration of the run.
        latents: folder of the latents.
        output: place of the LightningDiT's export.
        path: local path or storage URL of a released file, of a folder that `vavae export` writes for diffusers (the
            transformer's or the pipeline's), of an export or a run; or `hf-hub:owner/name[/path][@revision]` of one.

    Raises:
        UserError: it can't be used (see :mod:`vavae.interop.released_lightningdit` and
            :mod:`vavae.interop.diffusers_lightningdit`) or has other sizes than the configuration and the latents.
    """
    manifest = read_latent_manifest(latents)
    model = config.lightningdit.with_classes(len(manifest.classes))
    latent_dim, height, width = manifest.shape
    local = fetch_model(path, "LightningDiT")
    place = Storage(local)
    url = path if is_hub_address(path) else place.url()
    if any(map(place.is_file, (CONFIG, DESCRIPTION))):
        loaded = _exported_lightningdit(local, url, model, manifest)
    elif place.exists() and not place.is_file():
        folder = place.child("transformer") if place.is_file("model_index.json") else place
        loaded, _ = load_diffusers_lightningdit(folder, model, latent_dim, (height, width))
    else:
        settings = {**model.model_dump(), "latent_dim": latent_dim, "grid": (height, width)}
        loaded = convert_lightningdit(read_weights(local), settings, "lightningdit.")
    states = {WEIGHTS: loaded.state_dict()}
    description = LightningDiTDescription(
        lightningdit=model,
        latent_dim=latent_dim,
        grid=(height, width),
        tokenizer=manifest.tokenizer,
        statistics=manifest.statistics,
    )
    _write_export(output, url, description, states)


def _exported_lightningdit(address: str, url: str, config: LightningDiTConfig, latents: LatentManifest) -> LightningDiT:
    """Load the LightningDiT of an export or a run; UserError where it is another than the configured one."""
    found = find_model(address, "LightningDiT")
    assert not isinstance(found, str), "there is a description"
    folder = found.stored("train_lightningdit").folder if isinstance(found, Run) else found
    loaded, theirs = load_exported_lightningdit(folder)
    if (loaded.state_shape, theirs.statistics) != (latents.shape, latents.statistics):
        raise UserError(
            f"{url}: of latents {[*loaded.state_shape]} normalized per {theirs.statistics}, but those of this run are "
            f"{[*latents.shape]} per {latents.statistics}: set tokenizer, shards.image_size and latents.statistics so"
        )
    different = differences(theirs.lightningdit, config, "lightningdit")
    if different:
        field, before, now = different[0]
        raise UserError(f"{url}: its {field} is {before!r}, but {now!r} is configured: set it so")
    return loaded


def import_latents(config: RunConfig, shards: Storage, output: JobOutput, folder: str) -> None:
    """Make latents in the public layout those of the run, in place of encoding its training images.

    They are of the run's tokenizer, and of classes in the order of its image shards; the files say neither.

    Args:
        config: configuration of the run.
        shards: folder of the image shards.
        output: place of the latents, made from the run's tokenizer.
        folder: local path or storage URL of the public layout.

    Raises:
        UserError: they can't be used (see :mod:`vavae.interop.released_latents`) or have another shape than the
            configured tokenizer's.
    """
    if not config.latents.flip:
        raise UserError(f"{folder}: the public layout holds mirror images too, so set latents.flip=true")
    if config.latents.online:
        raise UserError(f"{folder}: these latents are stored, so set latents.online=false")
    if config.latents.normalization != "measured":
        raise UserError(f"{folder}: these latents have their own statistics, so set latents.normalization=measured")
    tokenizer, classes = output.draft.inputs["train_vavae"], read_manifest(shards).classes
    source, target = output.run.at(folder), output.folder
    shape, shard_images = config.latent_shape, config.shards.shard_images
    statistics = check_released_latents(source, shape, len(classes), shard_images)
    output.discard()  # once nothing can be wrong with the files that take its place
    import_released_latents(source, target, SPLIT, shape, tokenizer, classes, shard_images, statistics)
    files = {
        name: FileInfo(bytes=size, sha256=sha256_of(target.local_file(name))) for name, size in target.sizes().items()
    }
    _commit(output, files, source.url())


def export_tokenizer(tokenizer: StoredArtifact, path: str) -> None:
    """Write the run's tokenizer and its projection as a released checkpoint.

    Args:
        tokenizer: the tokenizer's export.
        path: local path or storage URL of the file.

    Raises:
        UserError: the file can't be written.
    """
    autoencoder = _vavae(tokenizer)
    if _given_statistics(tokenizer) is not None:
        _log.warning("%s: statistics of the latents, which came with the tokenizer, have no place in this format", path)
    alignment = load_alignment(tokenizer.folder) if ALIGNMENT in tokenizer.files else None
    save_released_tokenizer(path, autoencoder, alignment)


def _given_statistics(tokenizer: StoredArtifact) -> dict[str, Tensor] | None:
    """`mean` and `std` of the latents that came with an imported tokenizer, float64 [C]; None for none."""
    if STATISTICS not in tokenizer.files:
        return None
    return dict(zip(("mean", "std"), read_statistics(tokenizer.folder), strict=True))


def export_diffusers_tokenizer(
    tokenizer: StoredArtifact, latents: StoredArtifact | None, image_size: int | tuple[int, int], folder: str
) -> None:
    """Write the run's tokenizer as a folder for diffusers, with the statistics of its latents.

    They are those that the run's diffusion model takes, or before there are any those that came with the tokenizer.

    Args:
        tokenizer: the tokenizer's export.
        latents: latents of it; None before there are any.
        image_size: side, or height and width, of the images that it was trained on, pixels.
        folder: local path or storage URL.

    Raises:
        UserError: diffusers has no such architecture.
    """
    autoencoder, statistics = _vavae(tokenizer), _given_statistics(tokenizer)
    if latents is not None:
        statistics = dict(zip(("mean", "std"), read_statistics(latents.folder), strict=True))
    if statistics is not None and statistics["mean"].ndim != 1:
        _log.warning("%s: statistics of the latents per position have no place in this format", folder)
        statistics = None
    save_diffusers_tokenizer(folder, autoencoder, image_size, statistics)


def export_lightningdit(lightningdit: StoredArtifact, path: str) -> None:
    """Write the run's LightningDiT as a released checkpoint.

    Args:
        lightningdit: the LightningDiT's export.
        path: local path or storage URL of the file.

    Raises:
        UserError: the file can't be written.
    """
    model, _ = load_exported_lightningdit(lightningdit.folder)
    save_released_lightningdit(path, model)


def export_diffusers_lightningdit(lightningdit: StoredArtifact, folder: str) -> None:
    """Write the run's LightningDiT as a folder for diffusers, with the code of its network.

    Args:
        lightningdit: the LightningDiT's export.
        folder: local path or storage URL.

    Raises:
        UserError: it has parts that such a folder has no code for.
    """
    model, _ = load_exported_lightningdit(lightningdit.folder)
    save_diffusers_lightningdit(folder, model)


def export_latents(latents: StoredArtifact, target: Storage, seed: int) -> None:
    """Write the run's latents of its training images and their statistics in the public layout.

    Args:
        latents: the latents.
        target: folder to write.
        seed: seed of the posterior samples.

    Raises:
        UserError: the latents are without mirror images.
    """
    export_released_latents(latents.folder, SPLIT, target, seed)


def _check_architecture(config: RunConfig, tokenizer: PublishedTokenizer) -> None:
    """Refuse a tokenizer that describes itself as another than the configured one: tensors do not tell all of it."""
    found = [] if tokenizer.config is None else differences(tokenizer.config, config.tokenizer)
    if found:
        field, theirs, ours = found[0]
        keys = " ".join(
            f"tokenizer.{name}={json.dumps(identity(value))}".replace(", ", ",") for name, value, _ in found
        )
        raise UserError(
            f"{tokenizer.weights.url}: its {field} is {json.dumps(identity(theirs))}, but tokenizer.{field}="
            f"{json.dumps(identity(ours))} is configured: set {keys}"
        )


def _vavae(tokenizer: StoredArtifact) -> VAVAE:
    """Load a tokenizer of the kind that has other layouts; UserError of any other."""
    autoencoder, _ = load_exported_tokenizer(tokenizer.folder, encodes=False)
    if not isinstance(autoencoder, VAVAE):
        raise UserError(
            f"{tokenizer.folder.url()}: a tokenizer of kind {autoencoder.config.kind}, and other layouts are of kind "
            "kl: take its export as it is"
        )
    return autoencoder


def _alignment(config: RunConfig, weights: WeightsFile, feature_dim: int) -> VisionFoundationLoss:
    """The projection of a file; UserError unless it leads to the features of the configured teacher."""
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


def _write_export(
    output: JobOutput, address: str, description: Config, states: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write and commit the export of a training that took place elsewhere."""
    output.discard()
    _commit(output, save_export(output.folder, description, states), address)


def _commit(output: JobOutput, files: Mapping[str, FileInfo], url: str) -> None:
    content = digest({name: info.sha256 for name, info in files.items()})
    details: dict[str, Any] = {IMPORTED: PurePosixPath(url).name}
    output.commit(content, files, **details)
