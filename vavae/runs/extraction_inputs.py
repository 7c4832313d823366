"""The inputs of latent extraction, resolved once: image shards, tokenizer, and the place of the latents."""

from dataclasses import dataclass

from vavae.data.shards.manifest import Manifest, read_manifest
from vavae.runs.config import RunConfig
from vavae.runs.output import JobOutput
from vavae.runs.run import Run, StoredArtifact
from vavae.storage.storage import Storage


@dataclass(frozen=True)
class ExtractionInputs:
    """Images, tokenizer and place of a run's latents."""

    config: RunConfig
    images: Storage
    """Folder of the image shards."""
    manifest: Manifest
    """Manifest of the image shards."""
    tokenizer: StoredArtifact
    output: JobOutput

    @classmethod
    def of(cls, run: Run) -> "ExtractionInputs":
        """Resolve those of a run.

        Raises:
            UserError: the image shards or the tokenizer are missing.
        """
        run = run.snapshot()
        images = run.folder("prepare_shards")
        return cls(
            config=run.config,
            images=images,
            manifest=read_manifest(images),
            tokenizer=run.stored("train_vavae"),
            output=run.output("precompute_latents"),
        )
