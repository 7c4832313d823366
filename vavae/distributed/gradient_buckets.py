"""Averages of gradients over the ranks, in buckets, while the backward pass goes on."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vavae.distributed.config import EngineConfig, Precision
from vavae.distributed.world import World

_TYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class GradientBuckets:
    """Flat buffers whose parts are the gradients of parameters, each averaged as soon as it is complete.

    A backward pass fills them from the last parameter to the first. `DistributedDataParallel` does the same, but walks
    the graph of every step for parameters that no loss reaches, such as a projection without a teacher; here their
    gradients are zero, and their buckets leave last.

    Args:
        parameters: parameters to train, fp32, in the same order on every rank.
        config: size of a bucket, and the precision in which it travels.
        world: the ranks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: EngineConfig, world: World) -> None:
        self._world, self._dtype = world, _TYPES[config.communication_data_type]
        self._buffers: list[Tensor] = []
        self._sizes: list[int] = []
        bucket: list[nn.Parameter] = []
        for parameter in reversed(parameters):
            bucket.append(parameter)
            if sum(each.numel() for each in bucket) >= config.bucket_elements:
                self._add(bucket)
                bucket = []
        if bucket:
            self._add(bucket)
        self._missing: list[int] = []
        self._sent: list[tuple[Tensor, dist.Work]] = []

    def _add(self, bucket: Sequence[nn.Parameter]) -> None:
        index, sizes = len(self._buffers), [parameter.numel() for parameter in bucket]
        buffer = torch.zeros(sum(sizes), device=self._world.device)
        for parameter, part in zip(bucket, buffer.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
            parameter.register_post_accumulate_grad_hook(partial(self._complete, index))
        self._buffers.append(buffer)
        self._sizes.append(len(bucket))

    def begin(self) -> None:
        """Send each bucket off as the next backward pass completes it, the last one of a step."""
        self._missing = [*self._sizes]

    def _complete(self, index: int, _: Tensor) -> None:
        """Note that the backward pass has added to one gradient of a bucket."""
        if not self._missing:
            return
        self._missing[index] -= 1
        # In their order, which every rank must keep; a later one waits.
        while len(self._sent) < len(self._missing) and not self._missing[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        buffer = self._buffers[len(self._sent)]
        traveling = buffer.to(self._dtype)
        work = dist.all_reduce(traveling, async_op=True)
        assert work is not None, "an asynchronous collective has a handle"
        self._sent.append((traveling, work))

    def average(self) -> None:
        """Wait for the averages of all gradients, after the last backward pass of a step."""
        assert self._missing, "no backward pass has begun"
        while len(self._sent) < len(self._buffers):
            self._send()
        for buffer, (traveling, work) in zip(self._buffers, self._sent, strict=True):
            work.wait()
            buffer.copy_(traveling).div_(self._world.size)
        self._missing, self._sent = [], []

    def reset(self) -> None:
        """Set all gradients to zero."""
        torch._foreach_zero_(self._buffers)
