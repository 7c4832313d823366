"""Tasks of a sweep that take no time: they leave records, and metrics that are a formula of the configuration."""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vavae.config import digest
from vavae.data.shards.manifest import Manifest, ShardInfo, write_manifest
from vavae.evaluation.metric import Metric, metrics_json
from vavae.progress import Progress
from vavae.runs.config import RunConfig
from vavae.runs.files import METRICS
from vavae.runs.jobs import JOBS, Job
from vavae.runs.run import Run
from vavae.storage.artifact import Artifact, commit
from vavae.sweep.sharing import Sharing
from vavae.sweep.sweep import Sweep
from vavae.sweep.trial import Task, write_tokenizer_metrics

_SPLITS = ("train", "validation")
MADE = "made.txt"
"""In the storage's root: a line for each job that was done."""
HOLD, BROKEN = "hold", "broken"
"""While there is a file of this name in the root, trainings of LightningDiTs of depth 3 wait, and those of depth 4
fail."""

SWEEP = """
name: toy
base: {base}
sweep:
  tokenizer.latent_dim: {{grid: [4, 8]}}
  lightningdit.depth: {{grid: [2, 3]}}
rungs: [128]
"""


def toy_sweep_file(folder: Path, base: Path, text: str = SWEEP) -> Path:
    """Write a sweep file over a base."""
    path = folder / "sweep.yaml"
    path.write_text(text.format(base=base))
    return path


def made(root: Path) -> list[str]:
    """What was done, in order."""
    return (root / MADE).read_text().splitlines() if (root / MADE).exists() else []


def reconstruction(config: RunConfig) -> float:
    """The toy's reconstruction distance: more channels are better."""
    return 100 / config.tokenizer.latent_dim + config.seed


def generation(config: RunConfig, images: int) -> float:
    """The toy's generation distance: more images, fewer channels and more layers are better."""
    return 1000 * config.tokenizer.latent_dim / images / config.lightningdit.depth + config.seed


def toy_functions(root: Path) -> dict[Task, Callable[[Run], None]]:
    """The function that runs each task."""
    functions: dict[Task, Callable[[Run], None]] = {job: partial(_run_job, job, str(root)) for job in JOBS}
    return {**functions, "evaluate_tokenizer": partial(_evaluate_tokenizer, str(root))}


class InProcess:
    """Runs tasks in this process, as `SharedTasks` does on Ray."""

    def __init__(self, sweep: Sweep, root: Path) -> None:
        self._sharing = Sharing.of(sweep)
        self._functions = toy_functions(root)

    def request(self, config: RunConfig, task: Task) -> Run:
        job = next((job for job in self._sharing.jobs if job == task), None)
        if job is not None:
            return self._sharing.make(config, job, self._functions[job], self.request)
        self._functions[task](Run(config))
        return Run(config)


def _hold(job: Job, root: str, run: Run) -> None:
    """Report the same progress as long as trainings are held."""
    from ray_jobs.runtime.progress_actor import ProgressActor
    from ray_jobs.runtime.progress_monitor import monitor_progress

    progress = ProgressActor()
    with monitor_progress(run, job, progress):
        while os.path.exists(f"{root}/{HOLD}"):
            progress.report(Progress(job, 64, 256))
            time.sleep(0.1)


def _note(root: str, line: str) -> None:
    with open(f"{root}/{MADE}", "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def _run_job(job: Job, root: str, run: Run) -> None:
    budget = run.budget(job)
    if job == "train_lightningdit":
        if run.config.lightningdit.depth == 3 and os.path.exists(f"{root}/{HOLD}"):
            _hold(job, root, run)
        if run.config.lightningdit.depth == 4 and os.path.exists(f"{root}/{BROKEN}"):
            _note(root, "failed")
            raise RuntimeError("the toy broke")
    if job == "evaluate":
        assert budget is None
        trained = run.require("train_lightningdit").images_seen
        assert trained is not None
        metrics = {
            "reconstruction_frechet_distance": reconstruction(run.config),
            "generation_frechet_distance": generation(run.config, trained),
        }
        run.storage.write_json(METRICS, metrics_json([Metric(name, value) for name, value in metrics.items()]))
    content = digest({"job": job, "budget": budget, **run.identity(job), "inputs": run.inputs(job)})
    if job == "prepare_shards":
        splits = {split: (ShardInfo(name="000000.tar", count=100, bytes=1, sha256="0" * 64),) for split in _SPLITS}
        manifest = Manifest(splits=splits, classes=("a", "b"), image_size=run.config.shards.image_size, sources={})
        write_manifest(run.storage, run.prefix(job), manifest)
        record = Artifact(kind=JOBS[job].makes, digest=content, config=digest(run.config.shards))
        commit(run.storage, run.prefix(job), record)
    else:
        run.output(job).commit(content, {}, images_seen=budget)
    _note(root, f"{job} {run.config.name}" + (f" {budget}" if budget else ""))


def _evaluate_tokenizer(root: str, run: Run) -> None:
    write_tokenizer_metrics(run, {"psnr": float(run.config.tokenizer.latent_dim)})
    _note(root, f"evaluate_tokenizer {run.config.name}")


if __name__ == "__main__":
    from support import toy_trials

    from ray_jobs.tune_vf import main

    sys.exit(main(sys.argv[2:], toy_trials.toy_functions(Path(sys.argv[1]))))
