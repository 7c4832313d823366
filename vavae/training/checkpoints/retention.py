"""Which checkpoints of a training stay in storage."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from vavae.runs.config import BestConfig, TrainingConfig
from vavae.runs.run import Job, Run
from vavae.storage.artifact import Artifact, discard, read
from vavae.storage.storage import Storage
from vavae.training.checkpoints.metrics import CheckpointMetrics

logger = logging.getLogger(__name__)


class Retention(NamedTuple):
    """The last checkpoints stay, the best ones, and those that wait to be measured."""

    keep: int
    """How many of the last."""
    best: BestConfig | None = None
    """Which others."""
    measures: CheckpointMetrics | None = None
    """Figures by which the best are found, besides those of the log."""

    @classmethod
    def of(cls, run: Run, job: Job) -> "Retention":
        """That of a run's training."""
        config: TrainingConfig = getattr(run.config, job)
        measures = CheckpointMetrics.of(run) if job == "train_lightningdit" else None
        return cls(config.keep_checkpoints, config.keep_best, measures)

    def is_due(self, images_seen: int) -> bool:
        """Whether a checkpoint of this moment is to be measured."""
        return self.measures is not None and self.measures.is_due(images_seen)

    def prune(self, checkpoints: Storage, newest: str) -> None:
        """Delete the others, up to the newest; what lies ahead of it goes, too.

        Args:
            checkpoints: their folder.
            newest: name of the one that was committed last.
        """
        records = {name: read(checkpoints, name) for name in checkpoints.list()}
        committed = {name: record for name, record in records.items() if record is not None and name <= newest}
        kept = {*[*committed][-self.keep :], *self._best_of(committed), *self._waiting(committed)}
        for name in records:
            if name not in kept:
                discard(checkpoints, name)

    def _waiting(self, records: Mapping[str, Artifact]) -> list[str]:
        measures = self.measures
        return [] if measures is None else [name for name in records if measures.awaits(int(name))]

    def _best_of(self, records: Mapping[str, Artifact]) -> list[str]:
        """Names of the checkpoints that stay for what was measured of them."""
        best = self.best
        if best is None:
            return []
        rows = {name: self._figures(name, record) for name, record in records.items()}
        scores = {name: row[best.metric] for name, row in rows.items() if row.get(best.metric) is not None}
        if rows and not scores and not self._waiting(records):
            known = ", ".join(sorted({key for row in rows.values() for key in row}))
            logger.warning("keep_best.metric=%s is not a finite number in any row; there are: %s", best.metric, known)
        return sorted(scores, key=scores.__getitem__, reverse=best.mode == "max")[: best.count]

    def _figures(self, name: str, record: Artifact) -> dict[str, Any]:
        """The last row of the log before a checkpoint, and what was measured of it."""
        logged: Any = record.details.get("metrics", {})
        measured = {} if self.measures is None else self.measures.values().get(int(name), {})
        return {**logged, **measured}
