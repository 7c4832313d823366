"""The inputs of the trainings, resolved once before they begin."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vavae.config import digest
from vavae.runs.config import RunConfig, TrainingConfig
from vavae.runs.output import JobOutput
from vavae.runs.run import Job, Run
from vavae.storage.storage import Storage

if TYPE_CHECKING:  # torch takes seconds to import
    from vavae.distributed.world import World


@dataclass(frozen=True)
class TrainingInputs:
    """Configuration and folders of one training."""

    job: Job
    config: RunConfig
    folder: Storage
    """Folder of its checkpoints, log and previews."""
    tensorboard: Storage
    output: JobOutput
    """Place and draft of the export."""

    @property
    def training(self) -> TrainingConfig:
        """Section of the configuration."""
        section: TrainingConfig = getattr(self.config, self.job)
        return section

    @property
    def config_digest(self) -> str:
        """Digest of the identity of the configuration."""
        return self.output.draft.config

    @property
    def data_digest(self) -> str:
        """Digest of the data that it is trained on."""
        return digest(self.output.draft.inputs)


@dataclass(frozen=True)
class TokenizerTrainingInputs(TrainingInputs):
    """Inputs of `train_vavae`."""

    shards: Storage
    """Folder of the image shards."""

    @classmethod
    def of(cls, run: Run) -> "TokenizerTrainingInputs":
        """Resolve the inputs of a run's training.

        Raises:
            UserError: an input is missing.
        """
        job: Job = "train_vavae"
        return cls(
            job,
            run.config,
            run.training_folder(job),
            run.storage.child(f"tensorboard/{job}"),
            run.output(job),
            shards=run.folder("prepare_shards"),
        )


@dataclass(frozen=True)
class LightningDiTTrainingInputs(TrainingInputs):
    """Inputs of `train_lightningdit`."""

    latents: Storage
    """Folder of the latents."""
    tokenizer: Storage
    """Folder of the tokenizer's export, which decodes previews."""
    tokenizer_digest: str

    @classmethod
    def of(cls, run: Run) -> "LightningDiTTrainingInputs":
        """Resolve the inputs of a run's training.

        Raises:
            UserError: an input is missing.
        """
        job: Job = "train_lightningdit"
        return cls(
            job,
            run.config,
            run.training_folder(job),
            run.storage.child(f"tensorboard/{job}"),
            run.output(job),
            latents=run.folder("precompute_latents"),
            tokenizer=run.folder("train_vavae"),
            tokenizer_digest=run.require("train_vavae").digest,
        )


def begin_training(run: Run, job: Job, world: "World") -> TokenizerTrainingInputs | LightningDiTTrainingInputs:
    """Claim a training for the configuration of its run, on rank 0, and resolve its inputs. Every rank calls it.

    Raises:
        UserError: it was begun under another configuration, its weights were imported, or an input is missing.
    """
    if world.is_first:
        run.claim(job)
    return TokenizerTrainingInputs.of(run) if job == "train_vavae" else LightningDiTTrainingInputs.of(run)
