"""FLOP/s of a training, and their share of the devices' peak."""

import torch

from vavae.distributed.world import World
from vavae.runs.config import RunConfig
from vavae.runs.jobs import Job
from vavae.runs.training_config import TrainingConfig
from vavae.training.flops.flops import training_flops
from vavae.training.flops.gpus import gpu_of_device


class Utilization:
    """FLOP/s of all ranks, and model FLOP utilization: their share of the devices' peak (arXiv 2204.02311, appendix B).

    What is computed twice to save memory counts once.

    Args:
        config: configuration of the run.
        job: name of the training.
        world: the ranks; all devices are taken to be like this one.
    """

    def __init__(self, config: RunConfig, job: Job, world: World) -> None:
        self._config, self._job, self._ranks = config, job, world.size
        self._peak = config.workers.peak_flops or _peak(config, job, world.device)
        self._flops: dict[int, float] = {}

    def metrics(self, images_seen: int, images_per_second: float) -> dict[str, float]:
        """Metrics of a row of the log, by name.

        Args:
            images_seen: at the beginning of a step within the row.
            images_per_second: of all ranks.
        """
        per_second = self._flops_per_image(images_seen) * images_per_second
        metrics = {"flops_per_second": per_second}
        if self._peak is not None:
            metrics["model_flop_utilisation"] = per_second / (self._peak * self._ranks)
        return metrics

    def _flops_per_image(self, images_seen: int) -> float:
        """FLOPs of one image, counted once for each part of the training with networks of its own."""
        part = max((start for start in self._starts() if start <= images_seen), default=0)
        if part not in self._flops:
            self._flops[part] = training_flops(self._config, self._job, part)
        return self._flops[part]

    def _starts(self) -> list[int]:
        """Images seen at which the networks of a step change, from 0 on."""
        if self._job != "train_vavae":
            routing = self._config.lightningdit.routing
            return [0, *([routing.until_images] if routing is not None and routing.until_images else [])]
        phases = self._config.tokenizer_phases()
        adversaries = [phase.losses.adversarial.start_images for phase in phases]
        return [*(phase.from_images for phase in phases), *adversaries]


def _peak(config: RunConfig, job: Job, device: torch.device) -> float | None:
    """FLOP/s of a device in the precision of a training; None where it is not a GPU of `GPUS`."""
    gpu = gpu_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return None
    training: TrainingConfig = getattr(config, job)
    if training.precision == "bf16":
        return gpu.bf16
    return gpu.tf32 if config.workers.rounds_to_tf32 else gpu.fp32
