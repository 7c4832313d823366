"""Hardware of a training's last attempt, in a file beside its checkpoints; records of artifacts hold no place."""

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from vavae.hardware import processor_name

if TYPE_CHECKING:  # `vavae status` reads such files, and torch takes seconds to import
    from vavae.distributed.world import World

HARDWARE = "hardware.json"


class Hardware(BaseModel):
    """Hardware of one attempt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int
    device: str
    """Name of each worker's GPU, or of the processor that it shares."""
    threads: int
    """Threads of torch per worker, on a CPU."""
    torch: str
    """Version of torch."""
    lanes_at_once: int = 1
    """Lanes that a worker took in one pass."""

    @staticmethod
    def of(world: "World", lanes_at_once: int = 1) -> "Hardware":
        """Describe the ranks, taken to be like this one."""
        import torch

        on_gpu = world.device.type == "cuda"
        return Hardware(
            workers=world.size,
            device=torch.cuda.get_device_name(world.device) if on_gpu else processor_name(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            lanes_at_once=lanes_at_once,
        )

    def __str__(self) -> str:
        workers = f"{self.workers} workers" if self.workers > 1 else "1 worker"
        lanes = f", {self.lanes_at_once} lanes at once" if self.lanes_at_once > 1 else ""
        return f"{workers}, {self.device}, torch {self.torch}{lanes}"
