"""The inputs of evaluations and reports, resolved once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vavae.config import identity
from vavae.data.shards.manifest import MANIFEST, read_manifest
from vavae.runs.config import RunConfig
from vavae.runs.jobs import JOBS, TRAININGS, Job
from vavae.runs.run import Run, StoredArtifact, StoredCheckpoint
from vavae.storage.artifact import Artifact
from vavae.storage.storage import Storage
from vavae.tracking.tracker import TrackedJob
from vavae.tracking.trackers import TRACKING


@dataclass(frozen=True)
class EvaluationInputs:
    """Images, models and samples that an evaluation compares."""

    config: RunConfig
    storage: Storage
    """Folder of the run, where partial results and the references lie."""
    shards: Storage
    """Folder of the image shards."""
    tokenizer: StoredArtifact
    latents: StoredArtifact | None
    """Latents whose space is measured; None where the configuration asks for none, or before there are samples."""
    samples: StoredArtifact | None
    """Generated images; None before there are any."""

    @classmethod
    def of(cls, run: Run) -> "EvaluationInputs":
        """Resolve those of a run.

        Raises:
            UserError: the tokenizer is missing, or latents that are asked for.
        """
        run = run.snapshot()
        has_samples = run.artifact("sample") is not None
        measures_latents = has_samples and run.config.evaluate.latent_space is not None
        return cls(
            config=run.config,
            storage=run.storage,
            shards=run.folder("prepare_shards"),
            tokenizer=run.stored("train_vavae"),
            latents=run.stored("precompute_latents") if measures_latents else None,
            samples=run.stored("sample") if has_samples else None,
        )


@dataclass(frozen=True)
class CheckpointEvaluationInputs:
    """Models, data and training whose checkpoints are evaluated."""

    evaluation: EvaluationInputs
    """Inputs of the run's own evaluation, without the promise that its metrics follow an accepted protocol."""
    training: Storage
    """Folder of the training's checkpoints."""
    latents: Storage
    """Folder of the latents that it is trained on."""
    weak: StoredArtifact | StoredCheckpoint | None
    """LightningDiT that guides its samples, where the configuration names one."""

    @classmethod
    def of(cls, run: Run) -> "CheckpointEvaluationInputs":
        """Resolve those of a run.

        Raises:
            UserError: the tokenizer or the latents are missing, or the weak model can't guide.
        """
        config = run.config
        changes: dict[str, Any] = {"evaluate": config.evaluate.model_copy(update={"generation_protocol": "custom"})}
        weak = config.guidance.weak
        if weak is not None and weak.checkpoint_images is not None:  # which checkpoints before it can't have
            changes["guidance"] = config.guidance.model_copy(update={"weak": None})
        run = Run(config.model_copy(update=changes))
        return cls(
            evaluation=EvaluationInputs.of(run),
            training=run.training_folder("train_lightningdit"),
            latents=run.folder("precompute_latents"),
            weak=run.weak_model(),
        )

    @property
    def tracked(self) -> TrackedJob:
        """The evaluations as trackers show them, beside the training."""
        # A folder of its own: TensorBoard follows the newest file of a folder, and the training keeps writing its own.
        config, storage, job = self.evaluation.config, self.evaluation.storage, "train_lightningdit_measured"
        return TrackedJob(
            run=config.name,
            job=job,
            config=identity(config, with_runtime=True),
            storage=storage,
            records=self.training.child(f"{TRACKING}/measured"),
            tensorboard=storage.child(f"tensorboard/{job}"),
        )


@dataclass(frozen=True)
class ReportInputs:
    """Whatever the jobs of a run have left for its report so far."""

    config: RunConfig
    storage: Storage
    """Folder of the run."""
    artifacts: Mapping[Job, Artifact]
    """Records of what the jobs have made."""
    trainings: Mapping[Job, Storage]
    """Folders of the trainings that have data to train on."""
    shards: Storage
    """Folder of the image shards."""
    classes: int | None
    """Number of classes of the images; None before there are samples, and where the shards are gone."""

    @classmethod
    def of(cls, run: Run) -> "ReportInputs":
        """Resolve those of a run, finished or not."""
        run = run.snapshot()
        found = {job: run.artifact(job) for job in JOBS}
        shards, has_samples = run.folder("prepare_shards"), found["sample"] is not None
        return cls(
            config=run.config,
            storage=run.storage,
            artifacts={job: record for job, record in found.items() if record is not None},
            trainings={job: run.training_folder(job) for job in TRAININGS if found[JOBS[job].inputs[0]] is not None},
            shards=shards,
            classes=len(read_manifest(shards).classes) if has_samples and shards.is_file(MANIFEST) else None,
        )

    @property
    def tracked(self) -> TrackedJob:
        """The evaluation as trackers show it, each a run of its own."""
        return TrackedJob(
            run=self.config.name,
            job="evaluate",
            config=identity(self.config, with_runtime=True),
            storage=self.storage,
            records=self.storage.child(f"{TRACKING}/evaluate"),
            tensorboard=self.storage.child("tensorboard/evaluate"),
            resumes=False,
        )
