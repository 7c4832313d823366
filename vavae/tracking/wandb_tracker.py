"""Weights & Biases, where its own variables (`WANDB_PROJECT`, `WANDB_MODE` …) and the login of the machine lead."""

import os
from collections.abc import Mapping

import wandb
from PIL.Image import Image

from vavae.tracking.tracker import TrackedJob


class WandbRun:
    """A `TrackerRun` of W&B; offline, its files are below `tracking/wandb` in the folder of the run.

    Args:
        job: the job.
        identity: its identity in the project.
    """

    def __init__(self, job: TrackedJob, identity: str) -> None:
        folder = os.environ.get("WANDB_DIR")
        if folder is None:
            folder = str(job.folder)
            job.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "vavae"),
            id=identity,
            resume="allow",
            name=job.name,
            group=job.run,
            job_type=job.job,
            config=dict(job.config),
            allow_val_change=True,
            dir=folder,
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        self.link: str | None = None if self._run.offline else self._run.url
        self.last_step = self._run.starting_step - 1

    def metrics(self, step: int, row: Mapping[str, float]) -> None:
        """See `TrackerRun.metrics`."""
        self._run.log(dict(row), step=step)

    def picture(self, step: int, name: str, picture: Image) -> None:
        """See `TrackerRun.picture`."""
        self._run.log({name: wandb.Image(picture)}, step=step)

    def finish(self, failed: bool) -> None:
        """See `TrackerRun.finish`."""
        self._run.finish(exit_code=int(failed))
