"""Phases of the tokenizer's training: changes of its losses and frozen parts, without torch."""

from typing import Literal, NamedTuple, TypeVar

from pydantic import Field

from vavae.config import Config, added
from vavae.losses.config import TokenizerLossConfig

Part = Literal["encoder", "decoder", "projection"]
"""A part that can be frozen: half of the autoencoder with its 1x1 convolution, or the map to the teacher."""


class VisionFoundationChange(Config):
    """Fields of `losses.vision_foundation` that a phase may set; null leaves that of the phase before."""

    weight: float | None = Field(None, ge=0)
    cos_margin: float | None = Field(None, ge=0, le=2)
    distmat_margin: float | None = Field(None, ge=0, le=2)
    cos_weight: float | None = Field(None, ge=0)
    distmat_weight: float | None = Field(None, ge=0)


class PerceptualChange(Config):
    """Fields of `losses.perceptual` that a phase may set."""

    weight: float | None = Field(None, gt=0)


class AdversarialChange(Config):
    """Fields of `losses.adversarial` that a phase may set."""

    weight: float | None = Field(None, ge=0)
    start_images: int | None = Field(None, ge=0)


class LatentNoiseChange(Config):
    """Fields of `losses.latent_noise` that a phase may set."""

    scale: float | None = Field(None, ge=0)


class EquivarianceChange(Config):
    """Fields of `losses.equivariance` that a phase may set."""

    probability: float | None = Field(None, ge=0, le=1)
    small_images: float | None = Field(None, ge=0, le=1)


class LossChange(Config):
    """Fields of `losses` that a phase may set; a section that is null in `losses` has none."""

    vision_foundation: VisionFoundationChange = VisionFoundationChange()
    perceptual: PerceptualChange = PerceptualChange()
    adversarial: AdversarialChange = AdversarialChange()
    kl_weight: float | None = Field(None, ge=0)
    latent_noise: LatentNoiseChange = added(LatentNoiseChange())
    equivariance: EquivarianceChange = added(EquivarianceChange())


class TokenizerPhaseConfig(Config):
    """One entry of `train_vavae.stages`."""

    from_images: int = Field(0, ge=0)
    """Images seen at which it begins; it lasts until the next one begins or the budget ends."""
    losses: LossChange = LossChange()
    """Losses that it sets; all others are as in the phase before."""
    frozen: tuple[Part, ...] | None = None
    """Parts that do not learn; null leaves them as in the phase before."""


class TokenizerPhase(NamedTuple):
    """A phase with all fields resolved."""

    from_images: int
    until_images: int
    """Images seen at which the next one begins, or the budget."""
    losses: TokenizerLossConfig
    frozen: tuple[Part, ...]


def resolve_phases(
    phases: tuple[TokenizerPhaseConfig, ...], losses: TokenizerLossConfig, frozen: tuple[Part, ...], images: int
) -> list[TokenizerPhase]:
    """Resolve the phases of a budget, in order; those that begin after it are left out.

    Args:
        phases: as configured, in rising order of `from_images`.
        losses: before the first of them.
        frozen: likewise.
        images: the budget.

    Raises:
        ValueError: one changes a section of the losses that is null.
    """
    ends = [*(phase.from_images for phase in phases), images]
    resolved = [TokenizerPhase(0, min(ends[0], images), losses, frozen)]
    for phase, until in zip(phases, ends[1:], strict=True):
        losses = _with_changes(losses, phase.losses)
        frozen = frozen if phase.frozen is None else phase.frozen
        resolved.append(TokenizerPhase(phase.from_images, min(until, images), losses, frozen))
    return [phase for phase in resolved if phase.from_images < phase.until_images]


ConfigT = TypeVar("ConfigT", bound=Config)


def _with_changes(section: ConfigT, change: Config) -> ConfigT:
    """Copy a section with the fields that a change sets."""
    update = {}
    for name in type(change).model_fields:
        value = getattr(change, name)
        if isinstance(value, Config) and getattr(section, name) is not None:
            update[name] = _with_changes(getattr(section, name), value)
        elif isinstance(value, Config):
            if value != type(value)():
                raise ValueError(f"train_vavae.stages changes losses.{name}, which is null: give it, on or off")
        elif value is not None:
            update[name] = value
    return section.model_copy(update=update)
