"""The state of a training besides its weights, and what the commit record of a checkpoint says."""

from pydantic import BaseModel, ConfigDict


class TrainState(BaseModel):
    """Where a run stands, besides its weights. With the engines and the average it is all that a resume needs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images_seen: int
    config: str
    """Digest of the identity of the configuration."""
    data: str
    """Digest of what it is trained on."""
    excluded: tuple[tuple[int, int], ...] = ()
    """Positions of images, first and behind the last, that the run met on ways from which it had to go back."""

    @property
    def position(self) -> int:
        """Where the stream stands: images seen, and those that are excluded."""
        return self.images_seen + sum(last - first for first, last in self.excluded)

    def after(self, images: int) -> "TrainState":
        """The state after another step."""
        return self.model_copy(update={"images_seen": self.images_seen + images})

    def skip_past(self, diverged: "TrainState") -> "TrainState":
        """This state with its stream where another one stands."""
        return self.model_copy(update={"excluded": (*self.excluded, (self.position, diverged.position))})


class CheckpointDetails(BaseModel):
    """What the commit record says of a checkpoint besides its files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    state: TrainState
    updates: dict[str, int]
    """Of each optimizer."""
    memory: dict[str, list[float | None]]
    """See `Step.memory`."""
    metrics: dict[str, float | None]
    """The last row of the log; null for what is not finite."""
