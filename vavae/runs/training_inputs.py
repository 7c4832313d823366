"""The inputs of the trainings, resolved once before they begin, by one rank for all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

from vavae.config import digest, identity
from vavae.data.shards.manifest import Manifest, read_manifest
from vavae.errors import CommonError, UserError
from vavae.runs.config import RunConfig
from vavae.runs.jobs import Job
from vavae.runs.output import JobOutput
from vavae.runs.run import Run, StoredArtifact
from vavae.runs.training_config import TrainingConfig
from vavae.storage.retry import StorageUnavailableError
from vavae.storage.storage import Storage
from vavae.tracking.tracker import TrackedJob
from vavae.tracking.trackers import TRACKING

if TYPE_CHECKING:  # torch takes seconds to import
    from vavae.distributed.world import World

T = TypeVar("T")


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

    @property
    def tracked(self) -> TrackedJob:
        """The training as trackers show it."""
        config, records = identity(self.config, with_runtime=True), self.folder.child(TRACKING)
        return TrackedJob(self.config.name, self.job, config, self.output.run, records, self.tensorboard)


@dataclass(frozen=True)
class TokenizerTrainingInputs(TrainingInputs):
    """Inputs of `train_vavae`."""

    shards: Storage
    """Folder of the image shards."""
    manifest: Manifest
    """Manifest of the image shards."""

    @classmethod
    def of(cls, run: Run) -> "TokenizerTrainingInputs":
        """Resolve the inputs of a run's training.

        Raises:
            UserError: an input is missing.
        """
        job: Job = "train_vavae"
        run = run.snapshot()
        shards = run.folder("prepare_shards")
        return cls(
            job,
            run.config,
            run.training_folder(job),
            run.storage.child(f"tensorboard/{job}"),
            run.output(job),
            shards=shards,
            manifest=read_manifest(shards),
        )


@dataclass(frozen=True)
class LightningDiTTrainingInputs(TrainingInputs):
    """Inputs of `train_lightningdit`."""

    latents: Storage
    """Folder of the latents."""
    tokenizer: Storage
    """Folder of the tokenizer's export, which decodes previews."""
    tokenizer_digest: str
    images: Storage | None
    """Folder of the image shards that the training encodes; None where it reads latents."""
    image_manifest: Manifest | None
    """Manifest of those image shards."""
    start: StoredArtifact | None
    """Export whose weights it begins with; None where they are drawn."""
    averages: Mapping[str, JobOutput]
    """Places and drafts of the exports of further averages, by name."""

    @classmethod
    def of(cls, run: Run) -> "LightningDiTTrainingInputs":
        """Resolve the inputs of a run's training.

        Raises:
            UserError: an input is missing.
        """
        job: Job = "train_lightningdit"
        run = run.snapshot()
        images = run.stored("prepare_shards").folder if run.config.latents.online else None
        return cls(
            job,
            run.config,
            run.training_folder(job),
            run.storage.child(f"tensorboard/{job}"),
            run.output(job),
            latents=run.folder("precompute_latents"),
            tokenizer=run.folder("train_vavae"),
            tokenizer_digest=run.require("train_vavae").digest,
            images=images,
            image_manifest=None if images is None else read_manifest(images),
            start=run.starting_lightningdit(),
            averages={each.name: run.average_output(each.name) for each in run.config.train_lightningdit.averages},
        )


def begin_training(run: Run, job: Job, world: "World") -> TokenizerTrainingInputs | LightningDiTTrainingInputs:
    """Claim a training for the configuration of its run and resolve its inputs, on rank 0. Every rank calls it.

    Raises:
        CommonError: it was begun under another configuration, its weights were imported, or an input is missing.
    """

    def begin() -> TokenizerTrainingInputs | LightningDiTTrainingInputs:
        now = run.snapshot()
        now.claim(job)
        return TokenizerTrainingInputs.of(now) if job == "train_vavae" else LightningDiTTrainingInputs.of(now)

    return resolve_once(world, begin)


def resolve_once(world: "World", resolve: Callable[[], T]) -> T:
    """Return on every rank what rank 0 reads from storage: a thousand ranks ask for it once. Every rank calls it.

    Args:
        world: the ranks.
        resolve: called on rank 0 alone; its result is picklable.

    Raises:
        CommonError: it raised a UserError.
        StorageUnavailableError: it did.
    """
    value: T | None = None
    error: CommonError | StorageUnavailableError | None = None
    if world.is_first:
        try:
            value = resolve()
        except UserError as found:
            error = CommonError(str(found))
        except StorageUnavailableError as found:
            error = found
    resolved, error = world.broadcast((value, error))
    if error is not None:
        raise error
    return cast(T, resolved)
