"""Batch normalization over the images of all ranks; torch's own refuses CPU tensors.

Its result depends on how many images all ranks hold in one accumulation step, thus on the number of workers: the
micro-batches of weight 0 with which some world sizes fill a step count like any other. Every rank must call the layer,
and differentiate through it, equally often and in the same order.

A rank's gradient of its own loss is, at its input, that of the sum of all ranks' losses: averaged over ranks, as an
engine does, parameters get the gradient of the mean loss.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vavae.distributed.world import World


def sync_batch_norm(module: nn.Module, world: World) -> nn.Module:
    """Let every `BatchNorm2d` of a module, or the module itself, take its batch statistics over all ranks.

    Parameters and buffers are kept, under their names. Containers are changed in place; a world of one changes nothing.
    """
    if world.size == 1:
        return module
    for name, child in module.named_children():
        setattr(module, name, sync_batch_norm(child, world))
    return SyncBatchNorm2d(module) if type(module) is nn.BatchNorm2d else module


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization of [B, C, H, W] over B, H, W of all ranks, whose B may differ; in evaluation as its parent.

    Args:
        local: the layer to replace, whose parameters and buffers it takes over.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, local: nn.BatchNorm2d) -> None:
        assert local.affine, "expected a norm with scale and shift"
        assert local.track_running_stats, "expected a norm with running statistics"
        assert local.momentum is not None, "expected a norm with a momentum"
        super().__init__(local.num_features, local.eps, local.momentum)
        # The objects themselves: an optimizer may hold the parameters.
        self.weight, self.bias = local.weight, local.bias
        for name, buffer in local.named_buffers():
            setattr(self, name, buffer)
        self.train(local.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [B, C, H, W]; computed in float32, returned in the dtype of x."""
        if not self.training:
            return super().forward(x)
        values = x.float()
        local_count = values.new_tensor([values.numel() // self.num_features])
        total = _sum_over_ranks(torch.cat([values.sum(dim=(0, 2, 3)), local_count]))
        mean, count = total[:-1] / total[-1], total[-1].detach()
        centered = values - mean.view(-1, 1, 1)
        # From the deviations: the difference of two large moments would lose the digits that float32 has.
        variance = _sum_over_ranks(centered.square().sum(dim=(0, 2, 3))) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight.float() * torch.rsqrt(variance + self.eps)
        return (centered * scale.view(-1, 1, 1) + self.bias.float().view(-1, 1, 1)).to(x.dtype)

    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked.add_(1)


class _SumOverRanks(torch.autograd.Function):
    """A sum that every rank gets; its gradient is the sum of what comes back to all ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _sum_over_ranks(gradient)


def _sum_over_ranks(local: Tensor) -> Tensor:
    return _SumOverRanks.apply(local)
