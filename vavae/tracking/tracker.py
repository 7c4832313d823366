"""The interface of all trackers, and what they are told about the job that they follow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL.Image import Image

from vavae.storage.storage import Storage


@dataclass(frozen=True)
class TrackedJob:
    """A job as a tracker shows it: a run of its own, in the group of its run."""

    run: str
    """Name of the run."""
    job: str
    config: Mapping[str, Any]
    """Resolved configuration of the run, as plain JSON values."""
    storage: Storage
    """Folder of the run."""
    records: Storage
    """Folder where each tracker's identity of the job is kept, by which another attempt continues it."""
    tensorboard: Storage
    """Folder of TensorBoard's files."""
    resumes: bool = True
    """Another attempt continues the run that the one before began in a tracker; else it begins a new one."""

    @property
    def name(self) -> str:
        """Name of the job in a tracker."""
        return f"{self.run} {self.job}"

    @property
    def folder(self) -> Path:
        """Folder on this machine for files of trackers that are given no place."""
        storage = self.storage
        return Path(storage.url("tracking")) if storage.is_local else storage.cache_folder / "tracking"


class Tracker(Protocol):
    """A place where a job is followed; steps are images seen. Rank 0 alone talks to it."""

    def rewind(self, images_seen: int) -> None:
        """Begin, or begin again after a rollback: what follows is after so many images seen."""

    def metrics(self, images_seen: int, row: Mapping[str, float]) -> None:
        """Show metrics by name, all of them finite; several rows may have the same images seen."""

    def picture(self, images_seen: int, name: str, picture: Image) -> None:
        """Show a picture."""

    def flush(self) -> Callable[[], None]:
        """Flush what was shown at a checkpoint; returns a function that uploads it, in whatever thread."""

    def close(self, failed: bool) -> None:
        """Close the job, which has failed or not."""


class TrackerRun(Protocol):
    """A job in the client of a package, which may block or raise anything."""

    link: str | None
    """Address of its page; None where there is none."""
    last_step: int
    """The last step that an earlier attempt has logged; -1 where there is none."""

    def metrics(self, step: int, row: Mapping[str, float]) -> None:
        """Log metrics by name."""

    def picture(self, step: int, name: str, picture: Image) -> None:
        """Log a picture."""

    def finish(self, failed: bool) -> None:
        """Send what is left and end the run."""
