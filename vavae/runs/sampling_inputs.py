"""The inputs of sampling, resolved once: exported models, settings, and the place of the samples."""

from collections.abc import Sequence
from dataclasses import dataclass

from vavae.config import digest
from vavae.runs.config import RunConfig
from vavae.runs.output import JobOutput
from vavae.runs.run import Run, StoredArtifact, StoredCheckpoint


@dataclass(frozen=True)
class SamplingInputs:
    """Models, settings and place of a run's samples."""

    config: RunConfig
    tokenizer: StoredArtifact
    latents: StoredArtifact
    """Latents that the LightningDiT was trained on: their statistics, and the names of the classes."""
    lightningdit: StoredArtifact
    """Export of the LightningDiT, or of the average that `sample.weights` names."""
    weak: StoredArtifact | StoredCheckpoint | None
    """LightningDiT that guides, where the configuration names one."""
    origin: str
    """Digest of everything that a sample is a function of, besides its index."""
    output: JobOutput

    @classmethod
    def of(cls, run: Run) -> "SamplingInputs":
        """Resolve those of a run.

        Raises:
            UserError: a model or the latents are missing, or the weak model can't guide.
        """
        run = run.snapshot()
        identity = run.identity("sample")
        # Where a set grows, the samples that are there stay.
        each = {key: value for key, value in identity["sample"].items() if key != "images"}
        return cls(
            config=run.config,
            tokenizer=run.stored("train_vavae"),
            latents=run.stored("precompute_latents"),
            lightningdit=run.stored_lightningdit(run.config.sample.weights),
            weak=run.weak_model(),
            origin=digest({"config": {**identity, "sample": each}, "inputs": run.inputs("sample")}),
            output=run.output("sample"),
        )

    @classmethod
    def at(cls, folder: str, overrides: Sequence[str] = ()) -> "SamplingInputs":
        """Resolve those of the run in a folder, see `Run.at`."""
        return cls.of(Run.at(folder, overrides))
