"""Guidance when sampling, of all kinds. Time runs from noise (t = 0) to data (t = 1)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vavae.diffusion.config import GuidanceConfig, WeakModelConfig

LabeledVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function velocity(x [B, C, H, W], t [B], y int64 [B]) -> [B, C, H, W], for example a LightningDiT."""

Predict = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
"""Function of the same arguments to the velocity, that of an inner block, and tokens, as `LightningDiT.predict`; with a
further one, int64 [B, K], for the tokens that skip no block."""

KeptTokens = Callable[[float], Tensor]
"""Function from a share of tokens that skip blocks to those that do not, int64 [B, K], drawn anew at each call."""


def within(t: Tensor, interval: tuple[float, float]) -> Tensor:
    """Mask bool [B] of the times t [B] in a closed interval; bounds are compared in float32, as timesteps are."""
    low, high = torch.tensor(interval, dtype=torch.float32, device=t.device)
    return (low <= t) & (t <= high)


def drop_labels(labels: Tensor, null_label: int, probability: float, rng: torch.Generator) -> Tensor:
    """Replace each label of int64 [B] by the null label with a probability; one model then learns both velocities."""
    dropped = torch.rand(labels.shape, generator=rng, device=rng.device) < probability
    return labels.masked_fill(dropped.to(labels.device), null_label)


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """The guided velocity of a labeled model: v = v_null + scale · (v_label - v_null) (arXiv 2207.12598).

    Outside the interval, and with scale 1, it is v_label alone and the null label is not evaluated. Another model may
    give v_null, in an evaluation of its own.
    """

    model: LabeledVelocity
    null_label: int
    config: GuidanceConfig
    null_model: LabeledVelocity | None = None

    @property
    def jumps(self) -> list[float]:
        """Times between 0 and 1 at which guidance sets in or ends, ascending."""
        bounds = torch.tensor(self.config.intervals, dtype=torch.float32).flatten().tolist()
        return sorted({bound for bound in bounds if 0 < bound < 1})

    def active(self, t: Tensor) -> Tensor:
        """Mask bool [B] of the times t [B] that are guided."""
        return within(t, self.config.interval) & (self.config.scale != 1)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity at x [B, C, H, W], times t [B] and labels y int64 [B].

        Which images are guided is found out where t is: on the CPU that keeps no GPU waiting.
        """
        active = self.active(t).nonzero().flatten()
        if not len(active):
            return self.model(x, t, y)
        guided = active.to(x.device)
        null = torch.full_like(y[guided], self.null_label)
        if self.null_model is not None:
            labeled, unlabeled = self.model(x, t, y), self.null_model(x[guided], t[active], null)
        else:
            both = self.model(torch.cat([x, x[guided]]), torch.cat([t, t[active]]), torch.cat([y, null]))
            labeled, unlabeled = both.split([len(x), len(guided)])
        part = (guided, slice(self.config.channels))
        velocity, v_null = labeled.clone(), unlabeled[:, : self.config.channels]
        velocity[part] = v_null + self.config.scale * (labeled[part] - v_null)
        return velocity


@dataclass(frozen=True)
class InternalGuidance:
    """The velocity v + (scale - 1) · (v - v_mid), for each label by itself, v_mid of an inner block (arXiv 2512.24176).

    Outside the interval it is v.
    """

    predict: Predict
    config: GuidanceConfig

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity at x [B, C, H, W], times t [B] and labels y int64 [B]."""
        velocity, intermediate, *_ = self.predict(x, t.to(x.device), y)
        assert intermediate is not None, "the model has an intermediate head"
        excess = (self.config.internal_scale - 1) * within(t, self.config.internal_interval)
        return velocity + excess.view(-1, 1, 1, 1).to(velocity) * (velocity - intermediate)


@dataclass(frozen=True)
class Autoguidance:
    """The velocity v_weak + scale · (v - v_weak), both at the same label (arXiv 2406.02507).

    Outside the interval, and with scale 1, it is v alone and the weak model is not evaluated.
    """

    model: LabeledVelocity
    weak: LabeledVelocity
    config: WeakModelConfig

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity at x [B, C, H, W], times t [B] and labels y int64 [B]."""
        velocity = self.model(x, t, y)
        active = (within(t, self.config.interval) & (self.config.scale != 1)).nonzero().flatten()
        if not len(active):
            return velocity
        guided, velocity = active.to(x.device), velocity.clone()
        v_weak = self.weak(x[guided], t[active].to(x.device), y[guided])
        velocity[guided] = v_weak + self.config.scale * (velocity[guided] - v_weak)
        return velocity


def guided_by_routing(config: GuidanceConfig, t: Tensor) -> Tensor:
    """Mask bool [B] of the times t [B] with guidance by routing."""
    return within(t, config.routing_interval) & (config.routing_scale != 1)


@dataclass(frozen=True)
class RoutingGuidance:
    """The velocity v_routed + scale · (v - v_routed), v_routed of tokens that skip blocks (TREAD, arXiv 2501.04765).

    Outside the interval it is v, and v_routed is not evaluated.
    """

    guided: ClassifierFreeGuidance
    predict: Predict
    keep: KeptTokens

    @property
    def jumps(self) -> list[float]:
        """See `ClassifierFreeGuidance.jumps`."""
        return self.guided.jumps

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity at x [B, C, H, W], times t [B] and labels y int64 [B]."""
        velocity, config = self.guided(x, t, y), self.guided.config
        active = guided_by_routing(config, t).nonzero().flatten()
        if not len(active):
            return velocity
        rows = active.to(x.device)
        keep = self.keep(config.routing_drop)[rows]
        routed, *_ = self.predict(x[rows], t[active].to(x.device), y[rows], keep)
        velocity = velocity.clone()
        velocity[rows] = routed + config.routing_scale * (velocity[rows] - routed)
        return velocity


def guide(
    predict: Predict,
    null_label: int,
    config: GuidanceConfig,
    weak: LabeledVelocity | None = None,
    keep: KeptTokens | None = None,
) -> ClassifierFreeGuidance | RoutingGuidance:
    """Velocity of a model under all guidance that a configuration asks for.

    From the inside out: internal guidance, autoguidance, classifier-free guidance, guidance by routing.

    Args:
        predict: the model; it gets times on the device of x.
        null_label: label that stands for none.
        config: all guidance.
        weak: the model of `config.weak`; None where that is.
        keep: draws the tokens that skip no block; None where no guidance is by routing.
    """

    def alone(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return predict(x, t.to(x.device), y)[0]

    def without_path(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return predict(x, t.to(x.device), y, y.new_empty(len(y), 0))[0]

    model: LabeledVelocity = alone if config.internal_scale == 1 else InternalGuidance(predict, config)
    if config.weak is not None:
        assert weak is not None, "the weak model is loaded where the configuration names one"
        model = Autoguidance(model, weak, config.weak)
    labeled = ClassifierFreeGuidance(model, null_label, config, without_path if config.path_drop else None)
    if config.routing_scale == 1:
        return labeled
    assert keep is not None, "guidance by routing draws tokens"
    return RoutingGuidance(labeled, predict, keep)
