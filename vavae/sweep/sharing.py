"""What trials share is made once, in runs of its own below the sweep's folder, and lent to all that need it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vavae.config import digest
from vavae.config.load import dump
from vavae.errors import UserError
from vavae.runs.config import RunConfig
from vavae.runs.run import JOBS, Job, Run
from vavae.storage.artifact import RECORD
from vavae.sweep.branch import branch, prefix_of

SHARED_JOBS: tuple[Job, ...] = ("prepare_shards", "train_vavae", "precompute_latents")
"""Jobs whose artifacts trials share, in their order."""

_FOLDERS: dict[Job, tuple[str, ...]] = {
    "prepare_shards": ("shards",),
    "train_vavae": ("tokenizer", "tensorboard/train_vavae"),
    "precompute_latents": ("latents",),
}
_SOURCES = ("source", "validation_source", "validation_labels")
_STAGE_PATH = "train_vavae.stages."

Obtain = Callable[[RunConfig, Job], Run]
"""Gives the run that holds what a job makes of a configuration, once it is there."""


@dataclass(frozen=True)
class Sharing:
    """Where shared artifacts lie, and where tokenizers may branch.

    Args:
        root: `storage.root` of the runs that hold them.
        stages: stages of the tokenizer's training that the sweep varies, and therefore begins with a common prefix.
    """

    root: str
    stages: tuple[int, ...] = ()

    @staticmethod
    def of(root: str, paths: Iterable[str]) -> "Sharing":
        """The sharing of a sweep over some keys."""
        varied = {path.removeprefix(_STAGE_PATH).partition(".")[0] for path in paths if path.startswith(_STAGE_PATH)}
        return Sharing(root, tuple(sorted(int(stage) for stage in varied if stage.isdecimal())))

    def run(self, config: RunConfig, job: Job) -> Run:
        """The run that holds what a job makes of a configuration; the same for all that make the same."""
        storage = config.storage.model_copy(update={"root": self.root})
        name = f"{JOBS[job].makes.replace(' ', '-')}-{content_key(config, job)[:12]}"
        return Run(config.model_copy(update={"name": name, "storage": storage}))

    def make(self, config: RunConfig, job: Job, work: Callable[[Run], None], obtain: Obtain) -> Run:
        """Make what a job makes of a configuration, or go on with it, unless it is there; returns the run that has it.

        Args:
            config: of a trial.
            job: one of `SHARED_JOBS`.
            work: does the job in a run.
            obtain: what the job needs, which others may need too.
        """
        run = self.run(config, job)
        if run.artifact(job) is not None:
            return run
        for needed in JOBS[job].inputs:
            link_artifact(obtain(config, needed), run, needed)
        run.storage.write_bytes("config.yaml", dump(run.config).encode())
        prefix = self.prefix(config) if job == "train_vavae" else None
        if prefix is not None:
            branch(obtain(prefix, job), run)
        work(run)
        return run

    def prefix(self, config: RunConfig) -> RunConfig | None:
        """The longest common part of a tokenizer's training with those that differ from some stage on."""
        prefixes = [prefix_of(config, stage) for stage in self.stages]
        return next((prefix for prefix in reversed(prefixes) if prefix is not None), None)


def content_key(config: RunConfig, job: Job) -> str:
    """A digest of everything that decides what a job makes: its own settings, its budget, and those of its inputs."""
    run = Run(config)
    parts: dict[str, Any] = {"job": job, "identity": run.identity(job), "budget": run.budget(job)}
    if job == "prepare_shards":
        parts["sources"] = {name: getattr(config.shards, name) for name in _SOURCES}
    return digest({**parts, "inputs": {name: content_key(config, name) for name in JOBS[job].inputs}})


def link_files(owner: Run, run: Run, folder: str) -> None:
    """Give a run the files of a folder that it lacks."""
    held = run.storage.sizes(folder)
    for path in owner.storage.list(folder, recursive=True):
        if path not in held:
            run.storage.copy_from(owner.storage, path)


def link_artifact(owner: Run, run: Run, job: Job) -> None:
    """Give a run an artifact of another one, as if it had been made there; no bytes are copied on a local disk.

    Raises:
        UserError: it has another one already.
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
