"""Stages of the tokenizer's training: what changes at which image, without torch."""

from typing import Literal, NamedTuple, TypeVar

from pydantic import Field

from vavae.config import Config
from vavae.losses.config import TokenizerLossConfig

Part = Literal["encoder", "decoder", "projection"]
"""What can be left as it is: the autoencoder's halves, each with its 1x1 convolution, and the map to the teacher."""


class VisionFoundationChange(Config):
    """Fields of `losses.vision_foundation` that a stage may set; null leaves what the stage before had."""

    weight: float | None = Field(None, ge=0)
    cos_margin: float | None = Field(None, ge=0, le=2)
    distmat_margin: float | None = Field(None, ge=0, le=2)
    cos_weight: float | None = Field(None, ge=0)
    distmat_weight: float | None = Field(None, ge=0)


class PerceptualChange(Config):
    """Fields of `losses.perceptual` that a stage may set."""

    weight: float | None = Field(None, gt=0)


class AdversarialChange(Config):
    """Fields of `losses.adversarial` that a stage may set."""

    weight: float | None = Field(None, ge=0)
    start_images: int | None = Field(None, ge=0)


class LossChange(Config):
    """Fields of `losses` that a stage may set."""

    vision_foundation: VisionFoundationChange = VisionFoundationChange()
    perceptual: PerceptualChange = PerceptualChange()
    adversarial: AdversarialChange = AdversarialChange()
    kl_weight: float | None = Field(None, ge=0)


class TokenizerPhaseConfig(Config):
    """One entry of `train_vavae.stages`."""

    from_images: int = Field(0, ge=0)
    """Images seen at which it begins; it lasts until the next one begins or the budget ends."""
    losses: LossChange = LossChange()
    """What it sets; everything else is as in the stage before."""
    frozen: tuple[Part, ...] | None = None
    """Parts that do not learn; null leaves it as in the stage before."""


class TokenizerPhase(NamedTuple):
    """A stage with everything resolved."""

    from_images: int
    until_images: int
    """Images seen at which the next one begins, or the budget."""
    losses: TokenizerLossConfig
    frozen: tuple[Part, ...]


def resolve(
    stages: tuple[TokenizerPhaseConfig, ...], losses: TokenizerLossConfig, frozen: tuple[Part, ...], images: int
) -> list[TokenizerPhase]:
    """The stages of a budget, in order; those that begin after it are left out.

    Args:
        stages: as configured, in rising order of `from_images`.
        losses: before the first of them.
        frozen: likewise.
        images: the budget.
    """
    ends = [*(stage.from_images for stage in stages), images]
    resolved = [TokenizerPhase(0, min(ends[0], images), losses, frozen)]
    for stage, until in zip(stages, ends[1:], strict=True):
        losses = _changed(losses, stage.losses)
        frozen = frozen if stage.frozen is None else stage.frozen
        resolved.append(TokenizerPhase(stage.from_images, min(until, images), losses, frozen))
    return [stage for stage in resolved if stage.from_images < stage.until_images]


ConfigT = TypeVar("ConfigT", bound=Config)


def _changed(section: ConfigT, change: Config) -> ConfigT:
    """A section with the fields that a change sets."""
    update = {}
    for name in type(change).model_fields:
        value = getattr(change, name)
        if isinstance(value, Config):
            update[name] = _changed(getattr(section, name), value)
        elif value is not None:
            update[name] = value
    return section.model_copy(update=update)
