"""The manifests of latents and of features beside them: shards, shapes, and what made them."""

from typing import Any, Literal

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
    kind: Literal["kl", "representation"] = "kl"
    """Kind of the tokenizer: whether a latent has a mean and a deviation, or is a point."""
    statistics: Literal["channel", "position"] = "channel"
    """Statistics that latents are normalized by, per channel or per position: `latents.statistics`."""
    online: bool = False
    """True where no latents are stored: the shards are those of the images, less the unreadable ones, and lie in their
    folder. See `latents.online`."""

    @property
    def moments(self) -> int:
        """Arrays of one view of an image: mean and deviation, or the latent alone."""
        return 2 if self.kind == "kl" else 1

    @property
    def record_shape(self) -> tuple[int, int, int, int]:
        """Shape of one record's array: moments · (1 + flip), C, H, W."""
        return (self.moments * (1 + self.flip), *self.shape)

    def to_json(self) -> dict[str, Any]:
        """Plain values; without `kind`, `statistics` and `online` where they are what they always were."""
        later = ("kind", "statistics", "online")
        neutral = {name for name in later if getattr(self, name) == type(self).model_fields[name].default}
        return self.model_dump(mode="json", exclude=neutral)


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


def require_stored(storage: Storage, manifest: LatentManifest) -> LatentManifest:
    """Return the manifest of latents in a folder.

    Raises:
        UserError: there are their statistics alone.
    """
    if manifest.online:
        raise UserError(
            f"{storage.url()}: statistics alone, for latents.online=true stores no latents; run precompute_latents "
            "with latents.online=false"
        )
    return manifest


def read_latents_of(
    storage: Storage,
    tokenizer: str,
    shape: tuple[int, int, int],
    kind: str = "kl",
    statistics: str = "channel",
    online: bool = False,
) -> LatentManifest:
    """Read the manifest of the latents that a model is to be trained on.

    Args:
        storage: folder of the latents.
        tokenizer: digest of the tokenizer that must have made them.
        shape: C, H, W of one latent as the model takes it.
        kind: of that tokenizer.
        statistics: what their statistics must be of.
        online: True where there must be statistics alone.

    Raises:
        UserError: there are none, or they are another tokenizer's, of another kind or size, normalized otherwise, or
            stored where they are to be computed or the other way round.
    """
    manifest = read_latent_manifest(storage)
    required = (("tokenizer.kind", kind), ("latents.statistics", statistics), ("latents.online", online))
    for name, wanted in required:
        found = getattr(manifest, name.rpartition(".")[2])
        if found != wanted:
            raise UserError(
                f"{storage.url()}: latents of {name}={found} (tokenizer {manifest.tokenizer[:12]}), but {wanted} is "
                "configured; run precompute_latents"
            )
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
