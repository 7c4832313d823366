"""MeanFlow: average velocities, which lead over an interval of time in one step (arXiv 2505.13447).

Time runs from noise (t = 0) to data (t = 1). The average velocity w(x_t, t, r) is that from t to a later time r: the
flow leads from x_t to x_t + (r - t) w. With r = t it is the velocity itself.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from vavae.diffusion.config import MeanFlowConfig
from vavae.diffusion.flow_matching import PathSample
from vavae.diffusion.guidance import within

AverageVelocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Function w(x [B, C, H, W], t [B], y int64 [B], r [B]) -> [B, C, H, W], the average velocity from t to r."""


class TrainedAverageVelocity(Protocol):
    """A network that predicts average velocities, for the images of a micro-batch or some of them."""

    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor, r: Tensor, rows: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """Average velocity [B, C, H, W] from x [B, C, H, W] at t [B] to r [B], with labels y int64 [B].

        `rows`, int64 [B], tells which images of the micro-batch these are; None: all of them. `guidance` [B, 3] is that
        of :func:`draw_guidance`, for a network that takes it.
        """


class Intervals(NamedTuple):
    """Intervals of time of the images of a micro-batch."""

    starts: Tensor
    """[S] in [0, 1]."""
    ends: Tensor
    """[S] in [0, 1], none before its start."""
    rows: Tensor
    """Indices int64 [K] of those that may have a length: all others end where they start."""

    @classmethod
    def between(cls, times: Tensor, others: Tensor, uniform: Tensor, equal_fraction: float) -> "Intervals":
        """Intervals between two times of each image, but of no length for a share of them.

        Args:
            times, others: two independent draws of times [S] in [0, 1].
            uniform: uniform numbers [S] on the CPU, where how many have a length is known without waiting for a GPU.
            equal_fraction: probability of no length; the earlier time counts then.
        """
        rows = (uniform >= equal_fraction).nonzero().flatten().to(times.device, non_blocking=True)
        starts, later = torch.minimum(times, others), torch.maximum(times, others)
        return cls(starts, starts.index_copy(0, rows, later[rows]), rows)

    @classmethod
    def joined(cls, parts: "Sequence[Intervals]") -> "Intervals":
        """The intervals of several micro-batches as those of one."""
        first = accumulate((len(part.starts) for part in parts[:-1]), initial=0)
        rows = [part.rows + start for part, start in zip(parts, first, strict=True)]
        starts, ends, _ = zip(*parts, strict=True)
        return cls(torch.cat(starts), torch.cat(ends), torch.cat(rows))


def draw_guidance(max_scale: float, uniform: Tensor, intervals: Intervals) -> Tensor:
    """Draw the guidance of each image: its scale, log-uniform from 1, and the times low <= t <= high with it, [S, 3].

    Both ends are uniform, in the first and in the second half of the time; without a length all times are guided.

    Args:
        max_scale: largest scale.
        uniform: uniform numbers [3, S].
        intervals: the intervals over which velocities are averaged.
    """
    of_scale, low, high = uniform
    spans = torch.zeros_like(of_scale, dtype=torch.bool).index_fill(0, intervals.rows, True)
    low, high = torch.where(spans, low / 2, 0.0), torch.where(spans, (1 + high) / 2, 1.0)
    return torch.stack([max_scale**of_scale, low, high], dim=1)


class MeanFlowTarget(NamedTuple):
    """Targets of both outputs of a network in improved MeanFlow, [S, C, H, W] each."""

    average: Tensor
    velocity: Tensor
    """Guided velocity at the start of each interval."""


class MeanFlowLosses(NamedTuple):
    """Losses per sample, all float32 or float64 [B]."""

    velocity: Tensor
    """Mean squared error of the average velocity over channels and positions."""
    total: Tensor
    """Summed squared errors, each with the weight of its size."""
    instantaneous: Tensor | None = None
    """Mean squared error of the velocity at the start of the interval; None where it is not predicted by itself."""


class MeanFlowObjective:
    """Matching of the average velocity with w = v + (r - t) dw/dt, which it fulfills where it is exact.

    Args:
        config: weights of the losses, and guidance within the target.
        null_label: label that stands for none.
    """

    def __init__(self, config: MeanFlowConfig, null_label: int) -> None:
        self._config, self._null_label = config, null_label

    @torch.no_grad()
    def target(self, model: TrainedAverageVelocity, point: PathSample, y: Tensor, intervals: Intervals) -> Tensor:
        """Compute what the average velocity is to be, [S, C, H, W], without gradient.

        Args:
            model: the network as it is now.
            point: point on the path at the start of each interval, and the velocity there.
            y: labels int64 [S], the null label where a label was dropped.
            intervals: where the average is taken.
        """
        starts, ends, rows = intervals
        target = self._guided(model, point, starts, y)
        if not len(rows):
            return target
        x, t, labels, r, v = (each[rows] for each in (point.x_t, starts, y, ends, target))
        derivative = total_derivative(lambda x, t: model(x, t, labels, r, rows), x, t, v)
        target[rows] = v + (r - t).to(v).view(-1, 1, 1, 1) * derivative
        return target

    def _guided(self, model: TrainedAverageVelocity, point: PathSample, t: Tensor, y: Tensor) -> Tensor:
        """The velocity that is averaged: scale · v + (1 - scale - mix) · v(null) + mix · v(y), a new tensor."""
        config, x, velocity = self._config, point.x_t, point.velocity
        if not config.guides:
            return velocity.clone()
        guided = config.scale * velocity
        of_null = 1 - config.scale - config.mix
        if of_null:
            guided = guided + of_null * model(x, t, torch.full_like(y, self._null_label), t)
        if config.mix:
            guided = guided + config.mix * model(x, t, y, t)
        active = within(t, config.interval) & (y != self._null_label)
        return torch.where(active.view(-1, 1, 1, 1), guided, velocity)

    @torch.no_grad()
    def improved_target(
        self,
        average: TrainedAverageVelocity,
        instantaneous: AverageVelocity,
        point: PathSample,
        y: Tensor,
        intervals: Intervals,
        guidance: Tensor,
    ) -> MeanFlowTarget:
        """Compute what improved MeanFlow wants of both outputs, without gradient.

        The average velocity is differentiated along the network's own velocity, so its error depends on nothing that
        the network does not know.

        Args:
            average: the network as it is now.
            instantaneous: its velocity at t itself, of (x, t, y, guidance).
            point: point on the path at the start of each interval, and the velocity there.
            y: labels int64 [S], the null label where a label was dropped.
            intervals: where the average is taken.
            guidance: see :func:`draw_guidance`.
        """
        starts, ends, rows = intervals
        of_label = instantaneous(point.x_t, starts, y, guidance)
        none = guidance.new_tensor([1, 0, 1]).expand_as(guidance)
        of_null = instantaneous(point.x_t, starts, torch.full_like(y, self._null_label), none)
        scale, low, high = guidance.unbind(1)
        active = (low <= starts) & (starts <= high) & (y != self._null_label)
        share = torch.where(active, 1 - 1 / scale, 0.0).to(point.velocity).view(-1, 1, 1, 1)
        velocity = point.velocity + share * (of_label - of_null)
        target = velocity.clone()
        if len(rows):
            x, t, labels, r, v, inputs = (each[rows] for each in (point.x_t, starts, y, ends, of_label, guidance))
            derivative = total_derivative(lambda x, t: average(x, t, labels, r, rows, inputs), x, t, v)
            target[rows] += (r - t).to(target).view(-1, 1, 1, 1) * derivative
        return MeanFlowTarget(target, velocity)

    def improved(self, prediction: Tensor, instantaneous: Tensor, target: MeanFlowTarget) -> MeanFlowLosses:
        """Compare both outputs [B, C, H, W] with what they are to be; each error has a weight of its own."""
        average, velocity = self(prediction, target.average), self(instantaneous, target.velocity)
        return MeanFlowLosses(average.velocity, average.total + velocity.total, velocity.velocity)

    def __call__(self, prediction: Tensor, target: Tensor) -> MeanFlowLosses:
        """Compare predicted and wanted average velocities [B, C, H, W]; the weight of a sample takes no gradient."""
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        squared = (prediction.to(dtype) - target.to(dtype)).square().flatten(1)
        error = squared.sum(1)
        weight = (error.detach() + self._config.epsilon) ** -self._config.power
        return MeanFlowLosses(squared.mean(1), weight * error)


class _ConstantWeights(TorchFunctionMode):
    """Linear maps in forward mode with constant weights, without the product with their tangent of zero."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Map value and tangent of the input of a linear map each by itself, and leave all else as it is."""
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        x, weight, *bias = args
        value, tangent = forward_ad.unpack_dual(x)
        mapped = F.linear(value, weight, *bias)
        return mapped if tangent is None else forward_ad.make_dual(mapped, F.linear(tangent, weight))


def total_derivative(field: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """Derivative d/dt of a field(x, t) along the path through x [B, C, H, W] at t [B] with a velocity [B, C, H, W].

    It is taken in forward mode, in full precision. Attention is that of plain products, for fused kernels have no
    derivative in that mode; compiled blocks have none either, so they are called as written.
    """
    with (
        torch.no_grad(),
        torch.autocast(x.device.type, enabled=False),
        torch.compiler.set_stance("force_eager"),
        sdpa_kernel(SDPBackend.MATH),
        forward_ad.dual_level(),
        _ConstantWeights(),
    ):
        value = field(forward_ad.make_dual(x, velocity.to(x)), forward_ad.make_dual(t, torch.ones_like(t)))
        derivative = forward_ad.unpack_dual(value).tangent
        assert derivative is not None, "the field depends on x and t"
        return derivative
