"""One run on storage: its artifacts, their inputs, and the jobs that are still to do."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vavae.config import HubAddress, differences, digest, identity, is_hub_address, load, resolve_paths
from vavae.data.shards.plan import describe_sources
from vavae.data.shards.write import check_origin
from vavae.errors import UserError
from vavae.runs.checkpoints import CHECKPOINTS, checkpoint_name, find_checkpoints
from vavae.runs.config import RunConfig
from vavae.runs.files import CONFIG, NPZ
from vavae.runs.jobs import JOBS, TRAININGS, Job
from vavae.runs.output import JobOutput
from vavae.runs.training_config import TrainingConfig
from vavae.storage.artifact import RECORD, Artifact, is_intact, read
from vavae.storage.hub import commit_of, fetch_from_hub
from vavae.storage.storage import Storage

_AVERAGES = "lightningdit/averages"
_AVERAGE = "average of weights"
"""Folder of the exports of averages of the LightningDiT's weights besides the one in its own export."""

PUBLISHED: Mapping[Job, str] = {"train_vavae": "vae", "train_lightningdit": "transformer"}
"""Folders of the exports where `vavae push` has written a run; diffusers calls its models so."""

IMPORTED = "imported"
"""Among the details of a record: name of the file from which the weights were imported, in place of a training."""


def is_published(folder: Storage) -> bool:
    """Return whether `vavae push` has written a folder."""
    return folder.is_file(f"{PUBLISHED['train_vavae']}/{RECORD}")


@dataclass(frozen=True)
class Plan:
    """Whether a job has work to do now, and why."""

    done: bool
    why: str
    """In a few words, what there is or what is missing."""


@dataclass(frozen=True)
class StoredArtifact:
    """Artifact as the inputs of a job hold it: small, for every actor gets them, without the checksums of its files."""

    folder: Storage
    digest: str
    """Digest of its content."""
    files: tuple[str, ...]
    """Paths of its files in the folder."""


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint of the LightningDiT's training, for whoever reads its average of the weights."""

    training: Storage
    """Folder of the training."""
    images_seen: int
    digest: str
    """Digest of its content."""


class Run:
    """The artifacts of one configuration on its storage; `Run.at` opens the run in a folder.

    It knows nothing of what is stored until it is asked, and reads it anew each time; what is decided from several
    records is asked of a `snapshot`.

    Relative paths are resolved here, against the working directory of the command that makes the run: other processes
    work in other folders.

    Args:
        config: configuration of the run.
        published: folder that `vavae push` has written, a copy of one from it, or its place on the hub, which holds the
            exports and no data; None for the run itself.
    """

    def __init__(self, config: RunConfig, published: Storage | None = None) -> None:
        self.config, self.published = resolve_paths(config), published
        self.storage = Storage.of(self.config.storage).child(config.name) if published is None else published

    def __repr__(self) -> str:
        return f"Run.at({self.storage.url()!r})"

    def snapshot(self) -> "RunSnapshot":
        """The run at this moment, whose records are read once each."""
        return RunSnapshot(self)

    @classmethod
    def at(cls, folder: str | os.PathLike[str], overrides: Sequence[str] = ()) -> "Run":
        """Open the run in a folder, with the configuration that its last job was started with.

        Args:
            folder: path or URL; it may have been moved. Or `hf-hub:owner/name`, where `vavae push` has put a run.
            overrides: `key.path=value`, as on the command line of a job.

        Raises:
            UserError: there is no run, or its configuration can't be used.
        """
        storage = Storage(os.fspath(folder))
        try:
            path = storage.local_file(CONFIG)
        except FileNotFoundError as error:
            raise UserError(f"{storage.url()}: no {CONFIG} there, so this is not the folder of a run") from error
        config = load(RunConfig, path, overrides)
        if is_published(storage):
            return cls(config, storage)
        root, _, name = storage.url().rstrip("/").rpartition("/")
        place = config.storage.model_copy(update={"root": root or "/"})
        return cls(config.model_copy(update={"storage": place, "name": name}))

    def prefix(self, job: Job) -> str:
        """Folder of a job's artifact in the run's. Latents lie under the digest of the tokenizer that made them."""
        if job == "precompute_latents":
            return f"latents/{self.require('train_vavae').digest[:12]}"
        if self.published is not None and job in PUBLISHED:
            return PUBLISHED[job]
        return {
            "prepare_shards": "shards",
            "train_vavae": "tokenizer/export",
            "train_lightningdit": "lightningdit/export",
            "sample": "samples",
            "evaluate": "evaluation",
        }[job]

    def folder(self, job: Job) -> Storage:
        """Folder of a job's artifact, see `prefix`, as a storage."""
        return self.storage.child(self.prefix(job))

    def training_prefix(self, job: Job) -> str:
        """Folder of a training's checkpoints and log, under the digest of the data that it is trained on."""
        data = self.require(JOBS[job].inputs[0]).digest
        return f"{self.prefix(job).removesuffix('/export')}/{data[:12]}"

    def training_folder(self, job: Job) -> Storage:
        """Folder of a training's checkpoints and log, see `training_prefix`, as a storage."""
        return self.storage.child(self.training_prefix(job))

    def identity(self, job: Job) -> dict[str, Any]:
        """The part of the configuration that a job's artifact depends on."""
        return {name: identity(section) for name, section in self._sections(job).items()}

    def _sections(self, job: Job) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in JOBS[job].sections}

    def artifact(self, job: Job) -> Artifact | None:
        """Record of a job's artifact, if all its files are there."""
        return self.snapshot().artifact(job)

    def _read_artifact(self, job: Job) -> Artifact | None:
        if job == "precompute_latents" and self.artifact("train_vavae") is None:
            return None
        record = read(self.storage, self.prefix(job))
        if record is None or not is_intact(self.storage, self.prefix(job), record):
            return None
        beside = record.details.get("beside", {})
        assert isinstance(beside, dict), "details.beside maps names of files to sizes"
        return record if all(self._size(name) == size for name, size in beside.items()) else None

    def _size(self, path: str) -> int | None:
        return self.storage.size(path) if self.storage.is_file(path) else None

    def require(self, job: Job) -> Artifact:
        """Record of an artifact that another job needs.

        Raises:
            UserError: there is none yet.
        """
        record = self.artifact(job)
        if record is None:
            raise UserError(
                f"{self.storage.url()}: no {JOBS[job].makes} yet; "
                f"run python -m ray_jobs.{job} with this configuration first"
            )
        return record

    def stored(self, job: Job) -> StoredArtifact:
        """An artifact that another job reads, with its folder.

        Raises:
            UserError: there is none yet.
        """
        run = self.snapshot()
        record = run.require(job)
        return StoredArtifact(run.folder(job), record.digest, tuple(record.files))

    def inputs(self, job: Job) -> dict[str, str]:
        """Digests of a job's inputs, by the job that made each.

        Raises:
            UserError: an input is missing.
        """
        run = self.snapshot()
        digests: dict[str, str] = {name: run.require(name).digest for name in JOBS[job].inputs}
        if job == "sample" and self.config.sample.weights is not None:
            digests["train_lightningdit"] = run.require_average(self.config.sample.weights).digest
        weak = run.weak_model() if job == "sample" else None
        start = run.starting_lightningdit() if job == "train_lightningdit" else None
        others = {"weak_model": weak, "start_from": start}
        return digests | {name: other.digest for name, other in others.items() if other is not None}

    def average_prefix(self, name: str) -> str:
        """Folder of the export of an average of the LightningDiT's weights in the run's."""
        return f"{_AVERAGES}/{name}"

    def require_average(self, name: str) -> Artifact:
        """Record of the export of an average of the LightningDiT's weights.

        Raises:
            UserError: there is none by that name, or it is of another training than the configured one.
        """
        run, prefix = self.snapshot(), self.average_prefix(name)
        record, url = read(self.storage, prefix), self.storage.url()
        if record is None or not is_intact(self.storage, prefix, record):
            there = ", ".join(path.rpartition("/")[2] for path in self.storage.list(_AVERAGES)) or "none"
            raise UserError(
                f"{url}: no average of weights {name}; there are: {there}; train_lightningdit.averages keeps some "
                "while training, and vavae average reconstructs others after it"
            )
        if record.config != self._configuration("train_lightningdit") or record.inputs != run.inputs(
            "train_lightningdit"
        ):
            raise UserError(f"{url}: the average of weights {name} is of another training; run vavae average again")
        return record

    def stored_lightningdit(self, weights: str | None) -> StoredArtifact:
        """The LightningDiT's export, or that of an average.

        Args:
            weights: name of the average; None takes the export.

        Raises:
            UserError: there is none yet, or no such average.
        """
        if weights is None:
            return self.stored("train_lightningdit")
        record = self.require_average(weights)
        return StoredArtifact(self.storage.child(self.average_prefix(weights)), record.digest, tuple(record.files))

    def average_output(self, name: str) -> JobOutput:
        """Resolve where the export of an average of the LightningDiT's weights goes, as `output` does.

        Raises:
            UserError: an input of the training is missing.
        """
        output = self.output("train_lightningdit")
        draft = output.draft.model_copy(update={"kind": _AVERAGE})
        return JobOutput(self.storage, self.average_prefix(name), draft)

    def _weak_checkpoint(self, images_seen: int) -> StoredCheckpoint:
        training = self.training_folder("train_lightningdit")
        record = read(training.child(CHECKPOINTS), checkpoint_name(images_seen))
        if record is None:
            there = ", ".join(map(str, find_checkpoints(training))) or "none"
            raise UserError(
                f"guidance.weak.checkpoint_images={images_seen}: no such checkpoint in {training.url(CHECKPOINTS)}; "
                f"there are: {there}; a training keeps those of train_lightningdit.keep_images, and the last "
                "keep_checkpoints"
            )
        return StoredCheckpoint(training, images_seen, record.digest)

    def _check_weak_checkpoint(self) -> None:
        """Refuse guidance by a checkpoint that a training which is still to come would not keep."""
        weak, kept = self.config.guidance.weak, self.config.train_lightningdit.keep_images
        images_seen = None if weak is None else weak.checkpoint_images
        if images_seen is not None and images_seen not in kept and self.artifact("train_lightningdit") is None:
            raise UserError(
                f"guidance.weak.checkpoint_images={images_seen}: the training is to come, and it keeps this checkpoint "
                f"only where train_lightningdit.keep_images={[*kept]} names it: add it there"
            )

    def weak_model(self) -> StoredArtifact | StoredCheckpoint | None:
        """The model that `guidance.weak` names; None where the samples are not guided by a weaker model.

        Raises:
            UserError: there is no such LightningDiT or checkpoint, or it was trained on other latents.
        """
        weak = self.config.guidance.weak
        if weak is None:
            return None
        if weak.model is None:
            assert weak.checkpoint_images is not None, "the configuration takes one of them"
            return self._weak_checkpoint(weak.checkpoint_images)
        return self._lightningdit_on_these_latents("guidance.weak.model", weak.model)

    def starting_lightningdit(self) -> StoredArtifact | None:
        """The export that `train_lightningdit.start_from` names; None where weights are drawn.

        Raises:
            UserError: there is no such LightningDiT, or it was trained on other latents.
        """
        key, url = "train_lightningdit.start_from", self.config.train_lightningdit.start_from
        return None if url is None else self._lightningdit_on_these_latents(key, url)

    def _lightningdit_on_these_latents(self, key: str, url: str) -> StoredArtifact:
        """The export of a LightningDiT that a key of the configuration names."""
        folder, address = url, url
        if is_hub_address(url):
            place = HubAddress.parse(url)
            address = str(place._replace(path=place.path or PUBLISHED["train_lightningdit"]))
            folder = fetch_from_hub(address)
            address = commit_of(folder, address)  # the same for all workers
        parent, _, name = folder.rstrip("/").rpartition("/")
        storage = Storage.of(self.config.storage).at(parent)
        record, kinds = read(storage, name), (JOBS["train_lightningdit"].makes, _AVERAGE)
        if record is None or record.kind not in kinds or not is_intact(storage, name, record):
            raise UserError(
                f"{key}={url}: no whole export of a LightningDiT there; give a folder such as "
                "runs/NAME/lightningdit/export, or hf-hub:owner/name where vavae push has put one"
            )
        latents: Job = "precompute_latents"
        ours, theirs = self.require(latents).digest, record.inputs.get(latents, "unknown")
        if theirs != ours:
            raise UserError(
                f"{key}={url} was trained on latents {theirs[:12]}, but this run on {ours[:12]}: both must be on the "
                "same ones; train it in a run with the same tokenizer and shards"
            )
        return StoredArtifact(storage.at(address), record.digest, tuple(record.files))

    def plans(self, sources: bool = True) -> dict[Job, Plan]:
        """Plan every job, without any work.

        Args:
            sources: compare the sources of the images with those of the shards, too.

        Raises:
            UserError: an artifact was made with another configuration and is too precious to be made again under the
                same name, the sources of the images are not what they should be, or the average that is to be sampled
                or the checkpoint that is to guide is not there and no training makes or keeps it.
        """
        run, plans = self.snapshot(), dict[Job, Plan]()
        weights = self.config.sample.weights
        if weights is not None and self.config.train_lightningdit.average(weights) is None:
            run.require_average(weights)  # no training makes it
        run._check_weak_checkpoint()
        for job, spec in JOBS.items():
            missing = next((name for name in reversed(spec.inputs) if not plans[name].done), None)
            plans[job] = run._plan(job, sources) if missing is None else Plan(False, f"after {JOBS[missing].makes}")
        return plans

    def plan(self, job: Job) -> Plan:
        """Plan one job.

        Raises:
            UserError: as in `plans`; or an input is missing, or was made with another configuration.
        """
        run = self.snapshot()
        for name in JOBS[job].inputs:
            if run.require(name).config != self._configuration(name):
                raise UserError(
                    f"{self.storage.url()}: the {JOBS[name].makes} was made with another configuration; "
                    f"run python -m ray_jobs.{name} with this one, or give the run another name"
                )
        return run._plan(job)

    def _plan(self, job: Job, sources: bool = True) -> Plan:
        self._check_claim(job)
        record = self.artifact(job)
        if record is None:
            return Plan(False, self._begun(job))
        if job == "prepare_shards":
            if sources:  # which may take minutes to list
                shards = self.config.shards
                check_origin(self.storage, self.prefix(job), shards, describe_sources(shards, self.storage))
            return Plan(True, record.digest[:12])
        differs = self._differs(job, record)
        if differs and IMPORTED in record.details:
            raise UserError(f"{self.storage.url()}: the {JOBS[job].makes} was imported {differs}; import it again")
        if differs:
            return Plan(False, f"made {differs}")
        budget = self.budget(job)
        if budget is not None and IMPORTED not in record.details and (record.images_seen or 0) < budget:
            return Plan(False, f"{record.images_seen:,} of {budget:,} images seen")
        if job == "sample" and self.config.sample.npz and not self.storage.is_file(NPZ):
            return Plan(False, f"without {NPZ}")
        return Plan(True, record.digest[:12])

    def _begun(self, job: Job) -> str:
        """Progress, in words, of a job whose artifact is not there."""
        checkpoints = find_checkpoints(self.training_folder(job)) if job in TRAININGS else []
        return f"resumes at {checkpoints[-1]:,} of {self.budget(job):,} images" if checkpoints else "not there yet"

    def _differs(self, job: Job, record: Artifact) -> str:
        """Difference between an artifact's configuration or inputs and the present ones; empty where there is none."""
        if record.config != self._configuration(job):
            return "with another configuration"
        return "from other inputs" if record.inputs != self.inputs(job) else ""

    def _configuration(self, job: Job) -> str:
        """The digest that the record of an artifact must name as its configuration."""
        return digest(self.config.shards) if job == "prepare_shards" else digest(self.identity(job))

    def budget(self, job: Job) -> int | None:
        """Images that a training sees in full steps; None for jobs that train nothing."""
        section = getattr(self.config, job, None)
        return section.steps * section.batch_size if isinstance(section, TrainingConfig) else None

    def claim(self, job: Job) -> None:
        """Store the configuration under which a training begins, before its first checkpoint.

        Raises:
            UserError: it was started under another one, its weights were imported, or they should have been.
        """
        run = self.snapshot()
        run._check_claim(job)
        record = run.artifact(job)
        if record is not None and IMPORTED in record.details:
            raise UserError(
                f"{self.storage.url()}: the {JOBS[job].makes} is imported from {record.details[IMPORTED]}; "
                "give the run another name to train one"
            )
        if job == "train_vavae" and self.config.latents.normalization == "tokenizer":
            raise UserError(
                "latents.normalization=tokenizer takes statistics that come with an imported tokenizer, and this run "
                "is about to train its own: run vavae import tokenizer first, or take measured"
            )
        self.storage.write_json(run._claim_path(job), self.identity(job))

    def _check_claim(self, job: Job) -> None:
        """Refuse to resume a training under another configuration, naming the first field that differs."""
        if job not in TRAININGS:
            return
        try:
            begun = self.storage.read_json(self._claim_path(job))
        except FileNotFoundError:
            return
        found = differences(begun, self._sections(job))
        if found:
            path, old, new = found[0]
            raise UserError(
                f"{path} is {new!r}, but the {JOBS[job].makes} in {self.storage.url()} was begun with {old!r}; "
                "set it back or give the run another name"
            )

    def _claim_path(self, job: Job) -> str:
        return f"{self.training_prefix(job)}/configuration.json"

    def output(self, job: Job) -> JobOutput:
        """Resolve where a job puts its artifact, with the part of its record that is known before.

        Raises:
            UserError: an input is missing.
        """
        run = self.snapshot()
        prefix, identity_now = run.prefix(job), self.identity(job)
        draft = Artifact(
            kind=JOBS[job].makes,
            digest="",
            config=digest(identity_now),
            inputs=run.inputs(job),
            details={"identity": identity_now},
        )
        return JobOutput(self.storage, prefix, draft)

    def import_output(self, job: Job) -> JobOutput:
        """Where an import puts what takes the place of what a job makes.

        Raises:
            UserError: the run has made its own, which a command of minutes must not replace; or an input is missing.
        """
        run = self.snapshot()
        record = run.artifact(job)
        begun = job in TRAININGS and run.training_folder(job).exists(CHECKPOINTS)
        if begun or (record is not None and IMPORTED not in record.details):
            raise UserError(f"{self.storage.url()} has its own {JOBS[job].makes}; give the run another name")
        return run.output(job)


class RunSnapshot(Run):
    """A run at one moment: each record is read when it is first asked for, and then stays as it was.

    It serves one decision, such as a plan or the inputs of a job. It does not see what is made later, so it is not kept
    for longer.
    """

    def __init__(self, run: Run) -> None:
        self.config, self.storage, self.published = run.config, run.storage, run.published
        self._records: dict[Job, Artifact | None] = {}

    def snapshot(self) -> "RunSnapshot":
        """Itself: it stays at its moment."""
        return self

    def artifact(self, job: Job) -> Artifact | None:
        """See `Run.artifact`."""
        if job not in self._records:
            self._records[job] = self._read_artifact(job)
        return self._records[job]
