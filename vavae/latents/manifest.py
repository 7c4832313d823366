"""The manifests of latents and of features beside them: shards, shapes, and what made them."""

from pydantic import BaseModel, ConfigDict, ValidationError

from vavae.data.shards.manifest import Manifest, ShardList, read_manifest
from vavae.errors import UserError
from vavae.storage.storage import Storage

MANIFEST = "manifest.json"
FEATURES = "features"
"""Folder of features of the same images in that of the latents."""


class LatentManifest(BaseModel):
    """A set of latents: its shards, the shape of a latent, the classes, and the tokenizer that made it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokenizer: str
    """Digest of the tokenizer's export."""
    shape: tuple[int, int, int]
    """C, H, W of one latent."""
    flip: bool
    """Whether mirror images are stored too."""
    classes: tuple[str, ...]
    """Names of the classes; none for images without labels."""
    splits: dict[str, ShardList]

    @property
    def record_shape(self) -> tuple[int, int, int, int]:
        """Shape of one record's array: 2 · (1 + flip), C, H, W."""
        return (2 * (1 + self.flip), *self.shape)


def read_latent_manifest(storage: Storage) -> LatentManifest:
    """Read the manifest in a folder of latents.

    Raises:
        UserError: there is none.
    """
    try:
        return LatentManifest.model_validate_json(storage.read_bytes(MANIFEST))
    except (FileNotFoundError, ValidationError) as error:
        raise UserError(f"{storage.url(MANIFEST)}: no manifest of latents there; run precompute_latents") from error


def read_any_manifest(storage: Storage) -> Manifest | LatentManifest:
    """Read the manifest in a folder of image shards or of latents.

    Raises:
        UserError: there is neither.
    """
    found = storage.read_json(MANIFEST) if storage.is_file(MANIFEST) else None
    is_of_latents = isinstance(found, dict) and "tokenizer" in found
    return read_latent_manifest(storage) if is_of_latents else read_manifest(storage)


def read_latents_of(storage: Storage, tokenizer: str, shape: tuple[int, int, int]) -> LatentManifest:
    """Read the manifest of the latents that a model is to be trained on.

    Args:
        storage: folder of the latents.
        tokenizer: digest of the tokenizer that must have made them.
        shape: C, H, W of one latent as the model takes it.

    Raises:
        UserError: there are none, or they are another tokenizer's or of another size.
    """
    manifest = read_latent_manifest(storage)
    if manifest.tokenizer != tokenizer:
        raise UserError(
            f"{storage.url()}: latents of the tokenizer {manifest.tokenizer[:12]}, but the run's is {tokenizer[:12]}; "
            "run precompute_latents"
        )
    if manifest.shape != shape:
        raise UserError(
            f"{storage.url()}: latents {list(manifest.shape)}, but tokenizer.latent_dim={shape[0]} on a "
            f"{shape[1]} x {shape[2]} grid is configured; compute the latents of this tokenizer"
        )
    return manifest


class FeatureManifest(BaseModel):
    """A set of features: its shards, in the order of those of the latents, and what made it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str
    """Digest of the section `latents.features`."""
    shape: tuple[int, int]
    """N, F of one image."""
    flip: bool
    """True where features of mirror images are stored, too."""
    shards: ShardList

    @property
    def record_shape(self) -> tuple[int, int, int]:
        """Shape of one record's array: 1 + flip, N, F."""
        return (1 + self.flip, *self.shape)
