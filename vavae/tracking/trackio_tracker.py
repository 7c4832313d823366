"""trackio: on this machine below `TRACKIO_DIR`, or where `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` says."""

import os
from collections.abc import Mapping

import trackio
from PIL.Image import Image

from vavae.config.credentials import has_credentials
from vavae.tracking.tracker import TrackedJob


class TrackioRun:
    """A `TrackerRun` of trackio, in the project `TRACKIO_PROJECT` or `vavae`.

    Args:
        job: the job.
        identity: its identity, whose beginning is part of the name by which trackio resumes.
    """

    def __init__(self, job: TrackedJob, identity: str) -> None:
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "vavae"),
            name=f"{job.name} {identity[:8]}",
            group=job.run,
            config=dict(job.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        address = str(self._run.url or "")
        shown = address.startswith(("http://", "https://")) and not has_credentials(address)
        self.link = address if shown else None
        self.last_step: int = self._run._next_step - 1  # trackio tells it nowhere else, local or remote

    def metrics(self, step: int, row: Mapping[str, float]) -> None:
        """See `TrackerRun.metrics`."""
        self._run.log(dict(row), step=step)

    def picture(self, step: int, name: str, picture: Image) -> None:
        """See `TrackerRun.picture`."""
        self._run.log({name: trackio.Image(picture)}, step=step)

    def finish(self, failed: bool) -> None:
        """See `TrackerRun.finish`."""
        self._run.finish()
