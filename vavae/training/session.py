"""How the training loop speaks to whoever runs it: Ray, torchrun, a test."""

from collections.abc import Mapping
from typing import Protocol

from vavae.progress import Progress, show


class Session(Protocol):
    """The runner's side of a training run."""

    def progress(self, progress: Progress) -> None:
        """Show how far the run is; called by rank 0, cheap enough for every step."""

    def checkpoint(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """A checkpoint is on its way. Called by every rank equally often; may wait for all of them."""

    def stop_requested(self) -> bool:
        """Whether the run should save and leave. Asked on every rank at every step; one yes is enough."""


class LocalSession:
    """A run in this process: progress goes to standard output, and nothing asks it to stop."""

    def progress(self, progress: Progress) -> None:
        """See `Session.progress`."""
        show(progress)

    def checkpoint(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """See `Session.checkpoint`."""

    def stop_requested(self) -> bool:
        """See `Session.stop_requested`."""
        return False
