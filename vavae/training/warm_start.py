"""Initial weights: of a tokenizer, from another run, a released file or the hub; of a LightningDiT, of another run."""

from collections.abc import Mapping

from torch import Tensor, nn

from vavae.config import Config, differences, is_hub_address
from vavae.distributed.sharded_tensors import as_full_shard
from vavae.errors import UserError
from vavae.interop.checkpoint_file import WeightsFile, read_weights
from vavae.interop.export import ALIGNMENT, load_alignment, load_exported_lightningdit, load_exported_tokenizer
from vavae.interop.load import find_model, read_published_tokenizer
from vavae.interop.released_tokenizer import (
    convert_alignment,
    convert_discriminator,
    convert_tokenizer,
    holds_alignment,
    holds_discriminator,
)
from vavae.models.dit.config import LightningDiTConfig
from vavae.runs.config import RunConfig
from vavae.runs.run import Run, StoredArtifact
from vavae.storage.storage import Storage
from vavae.training.step import StepWeights


def starting_weights(config: RunConfig, feature_dim: int) -> StepWeights | None:
    """Load the weights that `train_vavae.start_from` names: autoencoder, and projection and discriminator if there.

    Args:
        config: configuration of the run.
        feature_dim: channels of the teacher's features.

    Raises:
        UserError: there is nothing, it is damaged, or its sizes are not those of the configuration.
    """
    url = config.train_vavae.start_from
    if url is None:
        return None
    source = _find(config, url)
    if isinstance(source, WeightsFile) and config.tokenizer.kind != "kl":
        raise UserError(
            f"train_vavae.start_from={url}: a released file is of a tokenizer of kind kl, and tokenizer.kind="
            f"{config.tokenizer.kind}: name an export of that kind"
        )
    engines = _released(config, source, feature_dim) if isinstance(source, WeightsFile) else _exported(config, source)
    shards = {engine: {name: as_full_shard(t) for name, t in state.items()} for engine, state in engines.items()}
    return StepWeights(shards, average=None)


def starting_lightningdit(stored: StoredArtifact | None, config: LightningDiTConfig) -> Mapping[str, Tensor] | None:
    """Load the weights that `train_lightningdit.start_from` names; None where it names none.

    Those of velocities lack the embeddings and the output layer that a model of average velocities has beside theirs.

    Args:
        stored: the export.
        config: sizes of the LightningDiT that begins with them, with its number of classes.

    Raises:
        UserError: the export is damaged, or its model is another one.
    """
    if stored is None:
        return None
    model, description = load_exported_lightningdit(stored.folder)
    theirs = description.lightningdit
    later = {name: True for name in ("average_velocity", "guidance_inputs") if getattr(config, name)}
    theirs = theirs.model_copy(update=later)
    _check_same(stored.folder, theirs, config, "lightningdit")
    state: Mapping[str, Tensor] = model.state_dict()
    return state


def _check_same(export: Storage, theirs: Config, ours: Config, section: str) -> None:
    """Refuse an export that was made with another configuration of its model."""
    found = differences(theirs, ours, section)
    if found:
        field, before, now = found[0]
        raise UserError(
            f"{export.url()}: made with {field}={before}, which is {now} here: correct it or start elsewhere"
        )


def _find(config: RunConfig, url: str) -> Storage | WeightsFile:
    """The export that an address means, or else the tensors that others have published."""
    if not is_hub_address(url):
        place = Storage.of(config.storage).at(url)
        return read_weights(url) if place.is_file() else place
    found = find_model(url, "tokenizer")
    if isinstance(found, str):
        return read_published_tokenizer(found).weights
    return found.stored("train_vavae").folder if isinstance(found, Run) else found


def _released(config: RunConfig, weights: WeightsFile, feature_dim: int) -> dict[str, dict[str, Tensor]]:
    losses = config.losses
    generator = _with_prefix("autoencoder", convert_tokenizer(weights, config.tokenizer.model_dump(), "tokenizer."))
    if holds_alignment(weights):
        sizes = {"latent_dim": config.tokenizer.latent_dim, "feature_dim": feature_dim}
        settings = losses.vision_foundation.model_dump() | sizes
        generator |= _with_prefix("alignment", convert_alignment(weights, settings, "losses.vision_foundation."))
    engines = {"generator": generator}
    if config.adversarial and losses.adversarial.kind == "patch" and holds_discriminator(weights):
        discriminator = convert_discriminator(weights, losses.adversarial.model_dump(), "losses.adversarial.")
        engines["discriminator"] = _with_prefix("discriminator", discriminator)
    return engines


def _exported(config: RunConfig, export: Storage) -> dict[str, dict[str, Tensor]]:
    autoencoder, description = load_exported_tokenizer(export, encodes=False)
    _check_same(export, description.tokenizer, config.tokenizer, "tokenizer")
    generator = _with_prefix("autoencoder", autoencoder)
    if export.is_file(ALIGNMENT):
        generator |= _with_prefix("alignment", load_alignment(export))
    return {"generator": generator}


def _with_prefix(part: str, module: nn.Module) -> dict[str, Tensor]:
    state: Mapping[str, Tensor] = module.state_dict()
    return {f"{part}.{name}": tensor for name, tensor in state.items()}
