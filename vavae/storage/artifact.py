"""The commit record of an artifact: one small file, written last, that names its content and inputs."""

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
    """Commit record of a finished job's output. It holds no time and no place: equal work gives equal records."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    """Kind of artifact: shards, tokenizer, latents, ..."""

    digest: str
    """Digest of its content; artifacts made from this one name it among their inputs."""

    config: str
    """Digest of the identity of the configuration that it was made with."""

    inputs: dict[str, str] = {}
    """Digests of the artifacts that it was made from, by role."""

    images_seen: int | None = None
    """Images seen in training; None where nothing was trained."""

    files: dict[str, FileInfo] = {}
    """Size and checksum of every file, by path relative to the artifact."""

    details: dict[str, JsonValue] = {}
    """Further facts for readers, which nothing depends on."""


def commit(storage: Storage, prefix: str, artifact: Artifact) -> None:
    """Write the record of the artifact at ``prefix``. Every file of it must have been put before."""
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
    """Return whether every file that the record names is there with its size."""
    sizes = storage.sizes(prefix)
    return all(sizes.get(f"{prefix}/{path}") == info.bytes for path, info in artifact.files.items())


def discard(storage: Storage, prefix: str) -> None:
    """Delete an artifact: the record first, so that a half-deleted one is never taken for done."""
    storage.delete(f"{prefix}/{RECORD}")
    storage.delete(prefix)
