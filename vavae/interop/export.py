"""Exports: folders with the weights of a trained model and all that is needed to build it again.

`model.safetensors` holds the weights in the released names, `model.yaml` the sections of the configuration. Nothing in
an export can run code. Where `vavae push` has written it for diffusers, too, the weights are in a file of diffusers.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vavae.config import Config, added, as_one_number, digest, identity
from vavae.errors import UserError
from vavae.finite import require_finite
from vavae.interop.checkpoint_file import WeightsFile
from vavae.interop.diffusers_lightningdit import read_network
from vavae.interop.diffusers_tokenizer import WEIGHTS as DIFFUSERS_WEIGHTS
from vavae.interop.diffusers_tokenizer import read_tensors, released_names
from vavae.latents.statistics import LatentNormalizer, read_statistics
from vavae.losses.config import VisionFoundationLossConfig
from vavae.losses.vision_foundation import VisionFoundationLoss
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT
from vavae.models.tokenizer.config import TeacherConfig, TokenizerConfig
from vavae.models.tokenizer.representation import Autoencoder, build_autoencoder, load_encoder
from vavae.runs.output import JobOutput
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.storage.artifact import Artifact, FileInfo
from vavae.storage.storage import Storage, sha256_of

WEIGHTS, ALIGNMENT, DESCRIPTION = "model.safetensors", "alignment.safetensors", "model.yaml"
"""Files of an export; that of a tokenizer which came with statistics of its latents has those of latents besides."""

DescriptionT = TypeVar("DescriptionT", bound=Config)


class TokenizerDescription(Config):
    """Description of a tokenizer and of the projection that it was aligned through, if it was."""

    tokenizer: TokenizerConfig
    teacher: TeacherConfig
    vision_foundation: VisionFoundationLossConfig
    feature_dim: int
    """Channels of the teacher's features."""
    encoder_weights: str | None = added(None)
    """Digest of the weights of the frozen encoder, which the export does not hold; null where it holds an encoder."""


class LightningDiTDescription(Config):
    """Description of a LightningDiT."""

    lightningdit: LightningDiTConfig
    latent_dim: int
    grid: Annotated[int | tuple[int, int], BeforeValidator(as_one_number)]
    """Side, or height and width, of a latent."""
    tokenizer: str
    """Digest of the tokenizer whose latents it was trained on."""
    statistics: Literal["channel", "position"] = added("channel")
    """Statistics that these latents were normalized by, see `latents.statistics`."""


def save_export(
    storage: Storage, description: Config, weights: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, FileInfo]:
    """Write an export.

    Args:
        storage: folder of the export.
        description: sections of the configuration.
        weights: state dicts by file name.

    Returns:
        Size and checksum of each file by name.
    """
    with tempfile.TemporaryDirectory(prefix="vavae-") as scratch:
        for name, state in weights.items():
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, Path(scratch, name))
        text = yaml.safe_dump(identity(description, with_runtime=True), sort_keys=False)
        Path(scratch, DESCRIPTION).write_text(text, encoding="utf-8")
        files = {}
        for path in sorted(Path(scratch).iterdir()):
            storage.put_file(path, path.name)
            files[path.name] = FileInfo(bytes=path.stat().st_size, sha256=sha256_of(path))
    return files


def commit_export(
    output: JobOutput,
    description: Config,
    weights: Mapping[str, Mapping[str, Tensor]],
    images_seen: int,
    **details: JsonValue,
) -> Artifact:
    """Write an export in place of the one that is there, and its record, which is returned.

    Args:
        output: place and draft of the record.
        description: sections of the configuration.
        weights: state dicts by file name.
        images_seen: by the training.
        details: of the record.
    """
    output.discard()
    files = save_export(output.folder, description, weights)
    content = digest({name: info.sha256 for name, info in files.items()})
    return output.commit(content, files, images_seen=images_seen, **details)


def load_exported_tokenizer(storage: Storage, encodes: bool = True) -> tuple[Autoencoder, TokenizerDescription]:
    """Load the tokenizer of an export, in evaluation mode on the CPU.

    Args:
        storage: folder of the export.
        encodes: load a frozen encoder, too, which the export only names; without it the tokenizer decodes alone.

    Raises:
        UserError: there is no such export, or the encoder's weights are not those that it was made with.
    """
    description = _describe(storage, TokenizerDescription)
    encoder = load_encoder(description.tokenizer) if encodes else None
    if encoder is not None and encoder.weights_digest() != description.encoder_weights:
        raise UserError(
            f"{storage.url()}: made with weights {description.encoder_weights} of the encoder "
            f"{encoder.config.name}, but those here are {encoder.weights_digest()}: put the former where "
            "tokenizer.encoder.weights says"
        )
    module = build_autoencoder(description.tokenizer, encoder)
    return _load(module, storage, WEIGHTS, lambda: released_names(read_tensors(storage), module.config)), description


def load_alignment(storage: Storage) -> VisionFoundationLoss:
    """Load the projection of an exported tokenizer, inside the loss that it was trained by."""
    description = _describe(storage, TokenizerDescription)
    latent_dim, feature_dim = description.tokenizer.latent_dim, description.feature_dim
    return _load(VisionFoundationLoss(description.vision_foundation, latent_dim, feature_dim), storage, ALIGNMENT)


def load_exported_lightningdit(storage: Storage) -> tuple[LightningDiT, LightningDiTDescription]:
    """Load the LightningDiT of an export, in evaluation mode on the CPU."""
    description = _describe(storage, LightningDiTDescription)
    model = LightningDiT(description.lightningdit, description.latent_dim, description.grid)
    return _load(model, storage, WEIGHTS, lambda: read_network(storage)), description


def load_latent_models(inputs: SamplingInputs) -> tuple[Autoencoder, LightningDiT, LatentNormalizer]:
    """Load what samples come from, on the CPU: both models, the first without its encoder, and what joins them.

    Raises:
        UserError: the LightningDiT was trained on another tokenizer's latents, or on latents normalized otherwise.
    """
    tokenizer, lightningdit, latents = inputs.tokenizer, inputs.lightningdit, inputs.latents
    autoencoder, _ = load_exported_tokenizer(tokenizer.folder, encodes=False)
    model, description = load_exported_lightningdit(lightningdit.folder)
    if description.tokenizer != tokenizer.digest:
        raise UserError(
            f"{lightningdit.folder.url()} was trained on latents of tokenizer {description.tokenizer[:12]}, but "
            f"{tokenizer.folder.url()} is {tokenizer.digest[:12]}; take the tokenizer that belongs to it"
        )
    normalizer = LatentNormalizer(*read_statistics(latents.folder))
    if normalizer.statistics != description.statistics:
        raise UserError(
            f"{lightningdit.folder.url()} was trained on latents normalized per {description.statistics}, but "
            f"{latents.folder.url()} has statistics per {normalizer.statistics}: set latents.statistics="
            f"{description.statistics}"
        )
    return autoencoder, model, normalizer


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def _load(
    module: ModuleT, storage: Storage, name: str, of_diffusers: Callable[[], WeightsFile] | None = None
) -> ModuleT:
    """Load the file of a name into a module, or what is read of the file of diffusers in its place."""
    try:
        module.load_state_dict(_read_state(storage, name, of_diffusers))
    except FileNotFoundError:
        raise UserError(f"{storage.url(name)}: no such file; export the model again") from None
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{storage.url(name)}: {reason}; export the model again") from error
    require_finite(module.state_dict(), storage.url(name), "export the model again, from an earlier checkpoint")
    return module.eval().requires_grad_(False)


def _read_state(storage: Storage, name: str, of_diffusers: Callable[[], WeightsFile] | None) -> Mapping[str, Tensor]:
    try:
        return load_file(storage.local_file(name))
    except FileNotFoundError:
        if of_diffusers is None or not storage.is_file(DIFFUSERS_WEIGHTS):
            raise
        return of_diffusers().tensors


def _describe(storage: Storage, model: type[DescriptionT]) -> DescriptionT:
    try:
        return model.restore(yaml.safe_load(storage.read_bytes(DESCRIPTION)))
    except FileNotFoundError:
        raise UserError(f"{storage.url()}: no {DESCRIPTION} there, so this is no export") from None
    except (ValidationError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{storage.url(DESCRIPTION)}: not the description of such a model ({reason})") from error


def strip_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state dict whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
