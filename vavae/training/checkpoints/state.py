"""State of a training besides its weights, and details of a checkpoint's commit record."""

from pydantic import BaseModel, ConfigDict

from vavae.storage.artifact import FileInfo


class TrainState(BaseModel):
    """Progress of a training. With the engines and the average it is all that a resume needs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images_seen: int
    config: str
    """Digest of the identity of the configuration."""
    data: str
    """Digest of the data that it is trained on."""
    excluded: tuple[tuple[int, int], ...] = ()
    """Data ranges that rollbacks skip: positions of the first image and behind the last."""

    @property
    def position(self) -> int:
        """Position in the stream: images seen and images skipped by rollbacks."""
        return self.images_seen + sum(last - first for first, last in self.excluded)

    def after(self, images: int) -> "TrainState":
        """State after another step of so many images."""
        return self.model_copy(update={"images_seen": self.images_seen + images})

    def skip_past(self, diverged: "TrainState") -> "TrainState":
        """This state, with its stream at the position of a diverged one."""
        return self.model_copy(update={"excluded": (*self.excluded, (self.position, diverged.position))})


class CheckpointDetails(BaseModel):
    """Details in a checkpoint's commit record."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    state: TrainState
    updates: dict[str, int]
    """Updates of each optimizer."""
    memory: dict[str, list[float | None]]
    """State of the step besides its weights, see `Step.state_dict`."""
    metrics: dict[str, float | None]
    """The last row of the log; null for what is not finite."""
    headers: dict[str, FileInfo] = {}
    """Size and checksum of the header of every file, by path, which holds a checksum of each tensor."""
