"""The ranks of a training run, and the few collectives that the loop needs."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vavae.errors import UserError

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
"""Variables of torchrun that hold a number."""


def _check_numbers() -> None:
    """Refuse variables that torchrun can't have set; raises UserError."""
    for name in _NUMBERS:
        value = os.environ.get(name, "0")
        if not value.isdecimal():
            raise UserError(f"{name}={value}: torchrun sets a number; unset it, or start the command with torchrun")


@contextmanager
def process_group(use_gpu: bool, timeout_seconds: float) -> Iterator[None]:
    """Join the process group of torchrun's environment; do nothing where torchrun did not start this process.

    Args:
        use_gpu: each rank has the GPU of its local rank, which is selected, and NCCL; otherwise gloo.
        timeout_seconds: longest wait of a collective for other ranks.
    """
    _check_numbers()
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    device = World.current(use_gpu).device
    timeout = timedelta(seconds=timeout_seconds)
    if use_gpu:
        # Collectives of objects and barriers take the selected GPU, which is the first one of every rank otherwise.
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


class PendingSums:
    """Sums over all ranks that are on their way to the host.

    Args:
        names: names of the sums.
        total: the sums, float64 [n], in their order.
    """

    def __init__(self, names: Sequence[str], total: torch.Tensor) -> None:
        self._names = names
        self._arrived = torch.cuda.Event() if total.is_cuda else None
        if self._arrived is None:
            self._values = total
        else:
            self._values = torch.empty_like(total, device="cpu", pin_memory=True).copy_(total, non_blocking=True)
            self._arrived.record()

    def read(self) -> dict[str, float]:
        """Wait for the sums; returns them by name."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))


@dataclass(frozen=True)
class World:
    """One process among the workers of a run."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls, use_gpu: bool = False) -> "World":
        """The world of an initialized process group, or a world of one where there is none."""
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_gpu else torch.device("cpu")
        if not dist.is_initialized():
            return cls(device=device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """Return whether this is the rank that logs, commits and reports."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0 on every rank; any picklable object."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks in order, on every rank; any picklable objects."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_values(self, values: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        """Gather values [n] of one type, on rank 0 alone. Every rank calls it.

        Args:
            values: of this rank.
            counts: n of every rank.

        Returns:
            The values of all ranks in order; nothing on the other ranks.
        """
        most = max(counts[1:], default=0)
        gathered = [values.new_empty(most) for _ in counts] if self.is_first else []
        if most:
            # All send equally many; what rank 0 sends to itself is cut off and dropped.
            dist.gather(nn.functional.pad(values, (0, most - len(values))), gathered or None)
        return [values, *(got[:count] for got, count in zip(gathered[1:], counts[1:], strict=True))] if gathered else []

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        """Gather equally many values [n] of every rank, on all of them; [W, n]."""
        if self.size == 1:
            return values[None]
        gathered = values.new_empty(self.size, len(values))
        dist.all_gather([*gathered], values)
        return gathered

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank; every rank gets the same result."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item())

    def sum_terms(self, terms: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Sum scalars of the same names over all ranks in one reduction, in float64 and in sorted order of name."""
        return self.begin_sum(terms).read()

    def begin_sum(self, terms: Mapping[str, torch.Tensor]) -> PendingSums:
        """Begin what `sum_terms` does, without waiting for a GPU."""
        names = sorted(terms)
        total = torch.stack([terms[name].detach().to(self.device, torch.float64) for name in names])
        return PendingSums(names, self.sum(total))
