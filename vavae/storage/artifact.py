"""The commit record of an artifact: one small file, written last: what was made, of what, and that it is whole."""

import logging

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from vavae.storage.storage import Storage

RECORD = "artefact.json"
_log = logging.getLogger(__name__)


class FileInfo(BaseModel):
    """Size and checksum of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class Artifact(BaseModel):
    """What a finished stage leaves behind. It holds no time and no place: equal work gives equal records."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    """What it is: shards, tokenizer, latents, ..."""

    digest: str
    """Digest of its content; whoever is made from this artifact names it."""

    config: str
    """Digest of the identity of the configuration it was made with."""

    inputs: dict[str, str] = {}
    """Digests of what it was made from, by role."""

    images_seen: int | None = None
    """Training images behind it, where there was training."""

    files: dict[str, FileInfo] = {}
    """Files that must be there, by path relative to the artifact."""

    details: dict[str, JsonValue] = {}
    """Whatever else a reader may like to know."""


def commit(storage: Storage, prefix: str, artifact: Artifact) -> None:
    """Declare the artifact at ``prefix`` done. Every file of it must have been put before."""
    storage.write_json(f"{prefix}/{RECORD}", artifact.model_dump())


def read(storage: Storage, prefix: str) -> Artifact | None:
    """The record at ``prefix``; None where nothing was committed, or where the record cannot be understood (logged)."""
    path = f"{prefix}/{RECORD}"
    try:
        return Artifact.model_validate_json(storage.read_bytes(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        reason = error.errors()[0]
        _log.warning("%s is no commit record (%s): taken as missing", storage.url(path), reason["msg"])
        return None


def is_intact(storage: Storage, prefix: str, artifact: Artifact) -> bool:
    """Whether every file that the record names is there with its size."""
    sizes = storage.sizes(prefix)
    return all(sizes.get(f"{prefix}/{path}") == info.bytes for path, info in artifact.files.items())


def discard(storage: Storage, prefix: str) -> None:
    """Delete an artifact: the record first, so that a half-deleted one is never taken for done."""
    storage.delete(f"{prefix}/{RECORD}")
    storage.delete(prefix)
