"""Configuration of objective, guidance and solver, without torch. Time runs from noise (t = 0) to data (t = 1)."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from vavae.config import Config, added


class TimestepConfig(Config):
    """Distribution of the timesteps that are trained on."""

    law: Literal["logit_normal", "uniform"] = "logit_normal"
    """`logit_normal` is sigmoid(N(mean, std²)); `uniform` uses neither."""
    mean: float = 0.0
    """Mean of the logit; positive leans towards the data."""
    std: float = Field(1.0, gt=0)
    """Standard deviation of the logit."""
    uniform_after_images: int | None = Field(None, ge=0)
    """Images seen from which on the law is uniform; null never switches. The released long run: 614,400,000."""


class RepresentationConfig(Config):
    """Alignment of an inner block's tokens with a teacher's features, which `latents.features` stores (REPA, iREPA)."""

    weight: float = Field(0.5, gt=0)
    """Weight of minus the mean cosine of projected tokens and features. Released: 0.5 (REPA), 1 (iREPA)."""
    after_block: int = Field(8, ge=1)
    """Number of blocks whose tokens are projected. Published: 8 of L and XL, 4 of B."""
    projector: Literal["mlp", "conv"] = "mlp"
    """`mlp` has three layers (REPA), `conv` is a convolution of 3 x 3 tokens (iREPA). It is trained, not exported."""
    projector_width: int = Field(2048, ge=1)
    """Hidden width of the `mlp`."""
    spatial_norm: float | None = Field(None, ge=0, le=1)
    """Share of its mean over the positions of an image that each channel of the features is less, before it is divided
    by its deviation there; 0.6 in iREPA. Null takes the features as they are."""
    decay_from_images: int | None = Field(None, ge=0)
    """Images seen from which on the weight falls linearly, to zero at `stop_images`; null keeps it until then."""
    stop_images: int | None = Field(None, ge=1)
    """Images seen from which on nothing is aligned and no features are read; null never stops."""

    def weight_at(self, images_seen: int) -> float:
        """Weight of the term after so many images."""
        left = math.inf if self.stop_images is None else self.stop_images - images_seen
        if left <= 0:
            return 0.0
        if self.stop_images is None or self.decay_from_images is None:
            return self.weight
        return self.weight * min(1.0, left / (self.stop_images - self.decay_from_images))

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        width = type(self).model_fields["projector_width"].default
        if self.projector == "conv" and self.projector_width != width:
            raise ValueError(f"projector_width={self.projector_width}, but projector=conv has no width: leave it out")
        if self.decay_from_images is not None and self.decay_from_images >= (self.stop_images or 0):
            raise ValueError(
                f"decay_from_images={self.decay_from_images} must be less than stop_images={self.stop_images}, where "
                "the weight reaches zero"
            )
        return self


class ObjectiveConfig(Config):
    """Loss of the predicted velocity, and label dropout."""

    direction_weight: float = Field(1.0, ge=0)
    """Weight of 1 - cosine(predicted, true velocity) relative to their mean squared difference."""
    intermediate_weight: float = added(0.5, gt=0)
    """Weight of the mean squared difference of the velocity that `lightningdit.intermediate_head` predicts."""
    representation: RepresentationConfig | None = added(None)
    """Align the tokens of an inner block with the features that `latents.features` stores. Null aligns nothing."""
    label_dropout: float = Field(0.1, ge=0, le=1)
    """Probability that an image is trained without its label, which guidance needs."""


class GuidanceConfig(Config):
    """Guidance when sampling: classifier-free, and internal by the weaker velocity of an inner block."""

    scale: float = Field(1.0, ge=0)
    """Scale w in v_null + w (v_label - v_null); 1 is no guidance."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Timesteps low <= t <= high that are guided. The released code has a low end only: [cfg_interval_start, 1]."""
    channels: int | None = Field(None, ge=1)
    """Guide only that many first channels (the released code: 3); null guides all."""

    internal_scale: float = added(1.0, ge=0)
    """Scale w in v + (w - 1) (v - v_mid), where v_mid is the velocity that `lightningdit.intermediate_head` predicts;
    it takes no further evaluation and comes before classifier-free guidance. 1 is no guidance."""
    internal_interval: tuple[float, float] = added((0.0, 1.0))
    """Timesteps low <= t <= high with internal guidance."""

    @property
    def summary(self) -> str:
        """Description in words, as metrics and reports carry it."""
        parts = []
        if self.scale != 1:
            channels = "" if self.channels is None else f" on {self.channels} channels"
            parts.append(f"guidance {self.scale:g} for t in [{self.interval[0]:g}, {self.interval[1]:g}]{channels}")
        if self.internal_scale != 1:
            low, high = self.internal_interval
            parts.append(f"internal guidance {self.internal_scale:g} for t in [{low:g}, {high:g}]")
        return ", ".join(parts) or "no guidance"

    @model_validator(mode="after")
    def _intervals_are_ordered(self) -> Self:
        for prefix in ("", "internal_"):
            low, high = getattr(self, f"{prefix}interval")
            if not 0 <= low <= high <= 1:
                raise ValueError(
                    f"{prefix}interval=[{low}, {high}] must satisfy 0 <= low <= high <= 1; {prefix}scale=1 switches "
                    "guidance off"
                )
        return self


class SolverConfig(Config):
    """The numerical integration from noise to data: on a grid of times, or by `dopri5`, which finds its own steps."""

    name: Literal["euler", "heun", "dopri5"] = "euler"
    """Solver of order 1, 2 or 5. `dopri5` gives every image steps of its own, whatever else is in the batch."""
    num_steps: int = Field(250, ge=1)
    """Intervals of the grid. Euler evaluates the velocity once in each, Heun twice. The released preset: 249."""
    shift: Annotated[float, Field(gt=0)] | Literal["by_dimension"] = 1.0
    """Shift of the grid: s in t' = s t / (1 + (s - 1) t). Below 1 it takes smaller steps near the noise, 1 spaces them
    evenly; `by_dimension` is √(4096 / C H W) for latents [C, H, W] (RAE, arXiv 2510.11690)."""
    rtol: float = Field(1e-3, ge=1e-6)
    """Error that `dopri5` allows in a step, relative to the latent. This and the next are SiT's."""
    atol: float = Field(1e-6, gt=0)
    """Error that `dopri5` allows in a step where the latent is near zero, absolute."""

    @property
    def summary(self) -> str:
        """Description in words, as metrics and reports carry it."""
        if self.name == "dopri5":
            return f"dopri5, relative tolerance {self.rtol:g}, absolute {self.atol:g}"
        shift = self.shift.replace("_", " ") if isinstance(self.shift, str) else f"{self.shift:g}"
        return f"{self.name} {self.num_steps} steps, shift {shift}"
