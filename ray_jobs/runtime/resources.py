"""CPUs and GPUs that jobs ask of the cluster."""

from typing import NamedTuple

from vavae.distributed.config import WorkersConfig
from vavae.runs.config import RunConfig


class Resources(NamedTuple):
    """CPUs and GPUs of one actor, worker or task."""

    cpus: float
    gpus: float

    @staticmethod
    def of(workers: WorkersConfig, cpus: float | None = None, gpus: float | None = None) -> "Resources":
        """Those of a training's worker unless given otherwise; no GPUs where the workers use none."""
        gpus = workers.gpus if gpus is None else gpus
        return Resources(workers.cpus if cpus is None else cpus, gpus if workers.use_gpu else 0)

    @staticmethod
    def for_checkpoint_evaluation(config: RunConfig) -> "Resources":
        """Resources for evaluating checkpoints beside the workers; none where that comes after training, or never."""
        evaluation = config.train_lightningdit.measure
        if evaluation is None or evaluation.when == "after":
            return NO_RESOURCES
        return Resources.of(config.workers, evaluation.cpus, evaluation.gpus)


NO_RESOURCES = Resources(0, 0)
