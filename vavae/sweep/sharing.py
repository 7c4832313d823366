"""Artifacts that trials share: each is made once, in a run of its own, and linked into the runs that need it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vavae.config import digest
from vavae.config.load import dump
from vavae.errors import UserError
from vavae.runs.config import RunConfig
from vavae.runs.jobs import JOBS, Job
from vavae.runs.run import Run
from vavae.storage.artifact import RECORD
from vavae.storage.storage import Storage
from vavae.sweep.branch import branch, prefix_of
from vavae.sweep.sweep import Sweep

_ALWAYS: tuple[Job, ...] = ("prepare_shards", "train_vavae", "precompute_latents")
_AFTER_TRAINING = ("guidance", "solver", "sample", "evaluate")
"""Sections that no training depends on."""

_FOLDERS: dict[Job, tuple[str, ...]] = {
    "prepare_shards": ("shards",),
    "train_vavae": ("tokenizer", "tensorboard/train_vavae"),
    "precompute_latents": ("latents",),
    "train_lightningdit": ("lightningdit", "tensorboard/train_lightningdit"),
}
SOURCES = ("source", "validation_source", "validation_labels")
"""Fields of the shards that say where images and labels lie; `labels`, which came later, is another."""
_PHASES = "train_vavae.stages."

JobRequest = Callable[[RunConfig, Job], Run]
"""Has a job run, once for all that request the same, and returns the run that holds its artifact."""


@dataclass(frozen=True)
class Sharing:
    """Artifacts that the trials of a sweep share: their folder, their jobs, and the phases at which tokenizers branch.

    Args:
        root: `storage.root` of the runs that hold them.
        phases: indices of the tokenizer's training phases that the sweep varies; each begins after a common prefix.
        jobs: jobs whose artifacts trials share, in their order.
    """

    root: str
    phases: tuple[int, ...] = ()
    jobs: tuple[Job, ...] = _ALWAYS

    @staticmethod
    def of(sweep: Sweep) -> "Sharing":
        """The sharing of a sweep.

        LightningDiTs are shared where the sweep varies a key that no training depends on, unless trials are evaluated
        while they train, at rungs or by `train_lightningdit.measure`.
        """
        varied = {
            path.removeprefix(_PHASES).partition(".")[0] for path in sweep.config.sweep if path.startswith(_PHASES)
        }
        sampling = any(path.partition(".")[0] in _AFTER_TRAINING for path in sweep.config.sweep)
        jobs = (*_ALWAYS, "train_lightningdit") if sampling and not _evaluates_while_training(sweep) else _ALWAYS
        return Sharing(sweep.shared, tuple(sorted(int(phase) for phase in varied if phase.isdecimal())), jobs)

    def run(self, config: RunConfig, job: Job) -> Run:
        """The run that holds a job's artifact for a configuration; the same for all with the same content."""
        storage = config.storage.model_copy(update={"root": self.root})
        name = f"{JOBS[job].makes.replace(' ', '-')}-{content_key(config, job)[:12]}"
        return Run(config.model_copy(update={"name": name, "storage": storage}))

    def make(self, config: RunConfig, job: Job, function: Callable[[Run], None], request: JobRequest) -> Run:
        """Run or resume a job for a configuration, unless its artifact exists; returns the run that holds it.

        Args:
            config: of a trial.
            job: one of `jobs`.
            function: runs the job in a run.
            request: has the jobs run whose artifacts this one needs.
        """
        run = self.run(config, job)
        if run.artifact(job) is not None:
            return run
        for needed in self.jobs[: self.jobs.index(job)]:
            link_artifact(request(config, needed), run, needed)
        run.storage.write_bytes("config.yaml", dump(run.config).encode())
        prefix = self.prefix(config) if job == "train_vavae" else None
        if prefix is not None:
            branch(request(prefix, job), run)
        function(run)
        return run

    def prefix(self, config: RunConfig) -> RunConfig | None:
        """The longest part of a tokenizer's training that is common to trials which differ from some phase on."""
        prefixes = [prefix_of(config, phase) for phase in self.phases]
        return next((prefix for prefix in reversed(prefixes) if prefix is not None), None)


def _evaluates_while_training(sweep: Sweep) -> bool:
    """Return whether samples are made before a LightningDiT has seen all its images."""
    points, seed = sweep.space.examples(), sweep.config.seeds[0]
    return bool(sweep.config.rungs) or any(
        sweep.run_config(point, seed).train_lightningdit.measure is not None for point in points
    )


def content_key(config: RunConfig, job: Job) -> str:
    """Digest of all that decides the content of a job's artifact: its settings and budget, and those of its inputs."""
    run = Run(config)
    parts: dict[str, Any] = {"job": job, "identity": run.identity(job), "budget": run.budget(job)}
    if job == "prepare_shards":
        parts["sources"] = {name: getattr(config.shards, name) for name in SOURCES}
        if config.shards.labels is not None:  # which came later than the others
            parts["sources"]["labels"] = config.shards.labels
    if job == "train_lightningdit" and config.train_lightningdit.keep_images:
        parts["checkpoints"] = config.train_lightningdit.keep_images  # runtime, but a trial may be guided by them
    return digest({**parts, "inputs": {name: content_key(config, name) for name in JOBS[job].inputs}})


def link_files(owner: Storage, target: Storage, folder: str) -> None:
    """Link into a run the files of another one's folder that it lacks.

    Args:
        owner: folder of the run with the files.
        target: folder of the run that lacks some.
        folder: path of the files in both.
    """
    held = target.sizes(folder)
    for path in owner.list(folder, recursive=True):
        if path not in held:
            target.copy_from(owner, path)


def link_artifact(owner: Run, run: Run, job: Job) -> None:
    """Link an artifact of one run into another, as if it had been made there; on a local disk no bytes are copied.

    Args:
        owner: the run with the artifact.
        run: the run that lacks it.
        job: the job that makes it.

    Raises:
        UserError: `run` has another one already.
    """
    record, held = owner.require(job), run.artifact(job)
    if held is not None and held.digest == record.digest:
        return
    if held is not None:
        raise UserError(
            f"{run.storage.url()}: its {JOBS[job].makes} is another than this sweep makes now; give the sweep "
            "another name, or delete that run"
        )
    last = f"{owner.prefix(job)}/{RECORD}"
    for folder in _FOLDERS[job]:
        for path in owner.storage.list(folder, recursive=True):
            if path != last:
                run.storage.copy_from(owner.storage, path)
    run.storage.copy_from(owner.storage, last)
