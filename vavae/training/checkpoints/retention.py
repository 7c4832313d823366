"""Retention of a training's checkpoints in storage."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from vavae.runs.training_config import BestConfig, LightningDiTTrainingConfig, TrainingConfig
from vavae.storage.artifact import Artifact, discard, read
from vavae.storage.storage import Storage
from vavae.training.checkpoints.metrics import CheckpointMetrics
from vavae.training.checkpoints.snapshots import AverageSnapshots

logger = logging.getLogger(__name__)


class Retention(NamedTuple):
    """The checkpoints that stay: the last ones, the best ones, those that are named, and those to be evaluated."""

    keep: int
    """Number of the last ones."""
    best: BestConfig | None = None
    """Rule for the best ones."""
    evaluations: CheckpointMetrics | None = None
    """Metrics by which the best are found, besides those of the log."""
    snapshots: AverageSnapshots | None = None
    """Snapshots of averages, which are saved with checkpoints and stay when those go."""
    named: tuple[int, ...] = ()
    """Images seen at those that stay whatever comes."""

    @classmethod
    def of(cls, training: Storage, config: TrainingConfig) -> "Retention":
        """Make the retention of a training.

        Args:
            training: folder of the training.
            config: its section of the configuration.
        """
        if not isinstance(config, LightningDiTTrainingConfig):
            return cls(config.keep_checkpoints, config.keep_best)
        evaluations, snapshots = CheckpointMetrics.of(training, config), AverageSnapshots.of(training, config)
        return cls(config.keep_checkpoints, config.keep_best, evaluations, snapshots, config.keep_images)

    def is_due(self, images_seen: int) -> bool:
        """Return whether a checkpoint of this moment is to stay, to be evaluated, or to leave a snapshot."""
        due = any(each is not None and each.is_due(images_seen) for each in (self.evaluations, self.snapshots))
        return due or images_seen in self.named

    def prune(self, checkpoints: Storage, newest: str) -> None:
        """Delete all other checkpoints, and all that lie ahead of the newest.

        Args:
            checkpoints: folder of the checkpoints.
            newest: name of the one that was committed last.
        """
        records = {name: read(checkpoints, name) for name in checkpoints.list()}
        committed = {name: record for name, record in records.items() if record is not None and name <= newest}
        named = [name for name in committed if int(name) in self.named]
        kept = {*[*committed][-self.keep :], *self._best_of(committed), *self._waiting(committed), *named}
        for name in records:
            if name not in kept:
                discard(checkpoints, name)
        if self.snapshots is not None:
            self.snapshots.prune(newest)

    def _waiting(self, records: Mapping[str, Artifact]) -> list[str]:
        evaluations = self.evaluations
        return [] if evaluations is None else [name for name in records if evaluations.awaits(int(name))]

    def _best_of(self, records: Mapping[str, Artifact]) -> list[str]:
        """Names of the checkpoints that stay for their metrics."""
        best = self.best
        if best is None:
            return []
        rows = {name: self._metrics(name, record) for name, record in records.items()}
        scores = {name: row[best.metric] for name, row in rows.items() if row.get(best.metric) is not None}
        if rows and not scores and not self._waiting(records):
            known = ", ".join(sorted({key for row in rows.values() for key in row}))
            logger.warning("keep_best.metric=%s is not a finite number in any row; there are: %s", best.metric, known)
        return sorted(scores, key=scores.__getitem__, reverse=best.mode == "max")[: best.count]

    def _metrics(self, name: str, record: Artifact) -> dict[str, Any]:
        """Metrics of a checkpoint: the last row of the log before it, and those of its evaluation."""
        logged: Any = record.details.get("metrics", {})
        evaluated = {} if self.evaluations is None else self.evaluations.values().get(int(name), {})
        return {**logged, **evaluated}
