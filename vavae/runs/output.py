"""The artifact that a job is about to make: its folder, and all of its record that is known before the work."""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from vavae.storage.artifact import Artifact, FileInfo, commit, discard
from vavae.storage.storage import Storage


@dataclass(frozen=True)
class JobOutput:
    """Folder of a job's artifact, and the draft of its record.

    Args:
        run: folder of the run.
        prefix: folder of the artifact in that of the run.
        draft: the record without digest and files.
    """

    run: Storage
    prefix: str
    draft: Artifact

    @property
    def folder(self) -> Storage:
        """Folder of the artifact."""
        return self.run.child(self.prefix)

    def discard(self) -> None:
        """Delete an artifact that is there, its record first."""
        discard(self.run, self.prefix)

    def commit(
        self, digest: str, files: Mapping[str, FileInfo], images_seen: int | None = None, **details: JsonValue
    ) -> Artifact:
        """Write the record, the last file of the artifact.

        Args:
            digest: of the content.
            files: size and checksum of each file, by path in the folder.
            images_seen: by a training.
            details: whatever else a reader may like to know; `beside` maps files in the folder of the run that belong
                to the artifact to their sizes.
        """
        update = {
            "digest": digest,
            "files": dict(files),
            "images_seen": images_seen,
            "details": {**self.draft.details, **details},
        }
        artifact = self.draft.model_copy(update=update)
        commit(self.run, self.prefix, artifact)
        return artifact
