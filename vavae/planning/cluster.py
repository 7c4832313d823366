"""The cluster that a plan is made for, and what is assumed of it. Without torch."""

import re
from dataclasses import dataclass

from vavae.errors import UserError
from vavae.training.flops.gpus import Gpu, gpu_named


@dataclass(frozen=True)
class ClusterSpec:
    """GPUs of one kind in nodes, with their bandwidth to each other and to the store."""

    gpu_name: str
    count: int
    node_gpus: int = 8
    price: float | None = None
    """Price of one GPU for an hour, in any currency."""
    utilization: float = 0.3
    """Share of the GPU's peak rate that convolutions and matrix products reach. The public code trains at 0.20."""
    network: float = 50e9
    """Bytes/s of a node to the other nodes, in one direction; 50e9 are 400 Gbit/s."""
    store: float = 3e9
    """Bytes/s of a node to and from the store; 3e9 are 24 Gbit/s."""
    hours_between_failures: float = 24.0
    """Mean time between failures of the whole cluster, evictions counted."""

    @property
    def gpu(self) -> Gpu:
        """Rates and memory of one GPU; UserError where its name is not known."""
        return gpu_named(self.gpu_name)

    @property
    def nodes(self) -> int:
        """Number of machines that hold the GPUs."""
        return -(-self.count // self.node_gpus)

    @property
    def interconnect(self) -> float:
        """Bytes/s at which gradients leave what they leave through: a node, or within one node a GPU."""
        return self.network if self.nodes > 1 else self.gpu.link


def parse_gpus(text: str) -> tuple[int, str]:
    """Parse number and name out of `64xH100`.

    Raises:
        UserError: it is written otherwise, or the name is not known.
    """
    match = re.fullmatch(r"([1-9]\d*)x([\w-]+)", text)
    if match is None:
        raise UserError(f"--gpus {text}: write a number, an x and a name, such as 64xH100")
    gpu_named(match[2])
    return int(match[1]), match[2].upper()
