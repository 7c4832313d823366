"""The inputs of a push, resolved once: what of a run goes to the hub."""

from collections.abc import Mapping
from dataclasses import dataclass

from vavae.config import digest, without_own_folders
from vavae.errors import UserError
from vavae.runs.config import RunConfig
from vavae.runs.files import LATENT_MAP, METRICS, RECONSTRUCTIONS, SAMPLES
from vavae.runs.run import PUBLISHED, Run, StoredArtifact
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.storage.artifact import Artifact
from vavae.storage.config import StorageConfig
from vavae.storage.storage import Storage


@dataclass(frozen=True)
class PushInputs:
    """Models, figures and pictures of a run that belong together."""

    config: RunConfig
    """Configuration of the run, without what is its owner's alone: storage, trackers, prices and folders."""
    storage: Storage
    """Folder of the run."""
    tokenizer: StoredArtifact
    latents: StoredArtifact | None
    """Latents of its training images, whose statistics go along; None before there are any."""
    latents_prefix: str
    """Their folder in that of the run."""
    sampling: SamplingInputs | None
    """Tokenizer and LightningDiT with the statistics between them; None of a run that has a tokenizer alone."""
    records: Mapping[str, Artifact]
    """Records of the artifacts by their folders in the pushed one."""
    files: tuple[str, ...]
    """Files in the folder of the run that are of these models: figures and pictures."""

    @classmethod
    def of(cls, run: Run) -> "PushInputs":
        """Resolve those of a run, finished or not.

        Raises:
            UserError: nothing is trained yet, or the samples need a second LightningDiT.
        """
        run = run.snapshot()
        if run.artifact("train_vavae") is None:
            raise UserError(f"{run.storage.url()}: nothing to push yet, for no tokenizer is trained or imported")
        has_model = run.artifact("train_lightningdit") is not None
        if has_model and run.config.guidance.weak is not None:
            raise UserError(
                "guidance.weak: its samples need a second LightningDiT, and one is pushed: set guidance.weak=null"
            )
        sampling = SamplingInputs.of(run) if has_model else None
        records: dict[str, Artifact] = {PUBLISHED["train_vavae"]: run.require("train_vavae")}
        if sampling is not None:
            weights = run.config.sample.weights
            model = run.require("train_lightningdit") if weights is None else run.require_average(weights)
            records[PUBLISHED["train_lightningdit"]] = model.model_copy(
                update={"kind": run.require("train_lightningdit").kind}
            )
        latents, prefix = run.artifact("precompute_latents"), run.prefix("precompute_latents")
        if latents is not None:
            records[prefix] = latents
        files: list[str] = []
        samples, measured = run.artifact("sample"), run.artifact("evaluate")
        if samples is not None and _is_of(samples, digest(run.identity("sample")), run.inputs("sample")):
            files.append(SAMPLES)
            models = {"train_vavae": run.require("train_vavae").digest, "sample": samples.digest}
            if measured is not None and _is_of(measured, digest(run.identity("evaluate")), models):
                files += [METRICS, RECONSTRUCTIONS, LATENT_MAP]
        return cls(
            config=_published(run.config),
            storage=run.storage,
            tokenizer=run.stored("train_vavae"),
            latents=None if latents is None else run.stored("precompute_latents"),
            latents_prefix=prefix,
            sampling=sampling,
            records=records,
            files=tuple(file for file in files if run.storage.is_file(file)),
        )


def _published(config: RunConfig) -> RunConfig:
    changes = {
        "storage": StorageConfig(),
        "tracking": RunConfig.model_fields["tracking"].default,
        "workers": config.workers.model_copy(update={"hourly_price": None}),
        "sample": config.sample.model_copy(update={"weights": None}),  # an average goes out as the LightningDiT
    }
    return without_own_folders(config.model_copy(update=changes))


def _is_of(record: Artifact, config: str, inputs: Mapping[str, str]) -> bool:
    """Return whether an artifact was made under the configuration of a digest, from inputs of these digests."""
    return record.config == config and inputs.items() <= record.inputs.items()
