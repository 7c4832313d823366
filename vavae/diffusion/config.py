"""Configuration of objective, guidance and solver, without torch. Time runs from noise (t = 0) to data (t = 1)."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from vavae.config import Config, ModelAddress, added

Shift = Annotated[float, Field(gt=0)] | Literal["by_dimension"]
"""Shift of times: s in t' = s t / (1 + (s - 1) t), or √(4096 / C H W) for latents [C, H, W] (RAE, arXiv 2510.11690)."""

TIMESTEP_BINS = 10
"""Number of equal parts of [0, 1] over which a loss is reported."""


def _check_interval(name: str, interval: tuple[float, float], off: str) -> None:
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{name}=[{low}, {high}] must satisfy 0 <= low <= high <= 1; {off} switches guidance off")


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
    shift: Shift = added(1.0)
    """Shift of what the law draws, whichever it is, like `solver.shift`, which stays on its own: below 1 towards the
    noise, 1 for none; `by_dimension` is √(4096 / C H W) for latents [C, H, W]."""


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


class MeanFlowConfig(Config):
    """Training of average velocities over intervals of time, so that one step leads from noise to data (MeanFlow).

    Both ends of an interval are drawn by `timesteps`; published: a mean of 0.4. See arXiv 2505.13447.
    """

    equal_fraction: float = Field(0.75, ge=0, le=1)
    """Probability that an interval has no length, where the average velocity is the velocity itself."""
    power: float = Field(1.0, ge=0)
    """Power p of the weight 1 / (e + epsilon)^p of an image, with e its squared error, summed over the latent."""
    epsilon: float = Field(0.01, gt=0)
    """See `power`."""
    scale: float = Field(1.0, ge=0)
    """Share ω of the true velocity v in the one that is averaged, ω v + (1 - ω - κ) v_null + κ v_label, whose other
    parts are the model's own: samples then are guided with scale ω / (1 - κ) and take no evaluation for it. Published:
    ω = 1, κ = 0.5 for B."""
    mix: float = Field(0.0, ge=0, lt=1)
    """Share κ there; with ω = 1 and κ = 0 nothing is guided."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Starts low <= t <= high of the intervals that are guided."""
    max_scale: float | None = added(None, gt=1)
    """Largest scale of guidance, which is drawn for each image and with its interval an input of the network, in place
    of `scale`, `mix` and `interval` (improved MeanFlow, arXiv 2512.02012); published: 8. Null: MeanFlow as it was."""

    @property
    def guides(self) -> bool:
        """True where the averaged velocity is a guided one."""
        return self.scale != 1 or self.mix != 0 or self.max_scale is not None

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> Self:
        _check_interval("interval", self.interval, "scale=1 with mix=0")
        if self.max_scale is not None and (self.scale, self.mix, self.interval) != (1, 0, (0, 1)):
            raise ValueError(
                f"max_scale={self.max_scale:g} draws the scale and the interval of each image: leave scale, mix and "
                "interval out"
            )
        return self


class ObjectiveConfig(Config):
    """Loss of the predicted velocity, and label dropout."""

    direction_weight: float = Field(1.0, ge=0)
    """Weight of 1 - cosine(predicted, true velocity) relative to their mean squared difference."""
    intermediate_weight: float = added(0.5, gt=0)
    """Weight of the mean squared difference of the velocity that `lightningdit.intermediate_head` predicts."""
    data_floor: float = added(0.05, gt=0, lt=1)
    """Least divisor 1 - t of the velocities that are trained where `lightningdit.prediction` is data; nearer to it the
    squared error of the data counts 1 / data_floor² times."""
    representation: RepresentationConfig | None = added(None)
    """Align the tokens of an inner block with the features that `latents.features` stores. Null aligns nothing."""
    mean_flow: MeanFlowConfig | None = added(None)
    """Train average velocities instead, as `lightningdit.average_velocity` predicts them. Null trains velocities."""
    class_token_weight: float = added(0.03, gt=0)
    """Weight of the mean squared difference of the velocity of `lightningdit.class_token`."""
    label_dropout: float = Field(0.1, ge=0, le=1)
    """Probability that an image is trained without its label, which guidance needs."""

    @model_validator(mode="after")
    def _mean_flow_stands_alone(self) -> Self:
        if self.mean_flow is None:
            return self
        if self.direction_weight:
            raise ValueError(
                f"direction_weight={self.direction_weight:g} is of velocities, and mean_flow trains average ones: set "
                "it to 0"
            )
        if self.mean_flow.guides and not self.label_dropout:
            raise ValueError(
                "mean_flow.scale, mix and max_scale guide away from the null label, which label_dropout=0 never "
                "trains: raise it"
            )
        return self


class WeakModelConfig(Config):
    """A weaker LightningDiT that guides a better one: autoguidance (EDM2, arXiv 2406.02507)."""

    model: ModelAddress | None = None
    """Export of a LightningDiT on the same latents, smaller or trained for a shorter time: path or URL of its folder,
    such as `runs/small/lightningdit/export`, or `hf-hub:owner/name` where `vavae push` has put one."""
    checkpoint_images: int | None = added(None, ge=1)
    """Images seen at a checkpoint of this run's own training, in place of `model`: its average of the weights guides.
    `train_lightningdit.keep_images` keeps it."""
    scale: float = Field(gt=0)
    """Scale w in v_weak + w (v - v_weak), at the same label; before classifier-free guidance. 1 is no guidance."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Timesteps low <= t <= high that are guided; in them the weak model is evaluated, too."""

    @property
    def summary(self) -> str:
        """Description in words, as metrics and reports carry it."""
        if self.model is None:
            by = f"its checkpoint of {self.checkpoint_images:,} images"
        else:
            by = self.model.rstrip("/").removesuffix("/export").removesuffix("/lightningdit").rpartition("/")[2]
        return f"autoguidance {self.scale:g} by {by} for t in [{self.interval[0]:g}, {self.interval[1]:g}]"

    @model_validator(mode="after")
    def _is_one_model(self) -> Self:
        if (self.model is None) == (self.checkpoint_images is None):
            raise ValueError("weak takes either model, the folder of an export, or checkpoint_images: give one of them")
        return self

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> Self:
        _check_interval("interval", self.interval, "weak=null")
        return self


class GuidanceConfig(Config):
    """Guidance when sampling: classifier-free, by the weaker velocity of an inner block, by a weaker model."""

    scale: float = Field(1.0, ge=0)
    """Scale w in v_null + w (v_label - v_null); 1 is no guidance."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Timesteps low <= t <= high that are guided. The released code has a low end only: [cfg_interval_start, 1]."""
    channels: int | None = Field(None, ge=1)
    """Guide only that many first channels (the released code: 3); null guides all."""

    path_drop: bool = added(False)
    """Take v_null without the blocks of `lightningdit.routing`, as if all tokens had skipped them; a model with `fuse`
    learns that."""

    internal_scale: float = added(1.0, ge=0)
    """Scale w in v + (w - 1) (v - v_mid), where v_mid is the velocity that `lightningdit.intermediate_head` predicts;
    it takes no further evaluation and comes before classifier-free guidance. 1 is no guidance."""
    internal_interval: tuple[float, float] = added((0.0, 1.0))
    """Timesteps low <= t <= high with internal guidance."""
    weak: WeakModelConfig | None = added(None)
    """A weaker model that guides; it needs no labels."""

    routing_scale: float = added(1.0, ge=0)
    """Scale w in v_routed + w (v - v_routed), where v is the velocity under all other guidance and v_routed that of the
    same label with tokens that skip the blocks of `lightningdit.routing`: one further evaluation. 1 is no guidance."""
    routing_interval: tuple[float, float] = added((0.0, 1.0))
    """Timesteps low <= t <= high with guidance by routing."""
    routing_drop: float = added(0.5, gt=0, lt=1)
    """Share of the tokens that skip them there; others are drawn in every evaluation."""

    @property
    def summary(self) -> str:
        """Description in words, as metrics and reports carry it."""
        parts = []
        if self.scale != 1:
            channels = "" if self.channels is None else f" on {self.channels} channels"
            dropped = " by path drop" if self.path_drop else ""
            low, high = self.interval
            parts.append(f"guidance {self.scale:g}{dropped} for t in [{low:g}, {high:g}]{channels}")
        if self.internal_scale != 1:
            low, high = self.internal_interval
            parts.append(f"internal guidance {self.internal_scale:g} for t in [{low:g}, {high:g}]")
        if self.weak is not None:
            parts.append(self.weak.summary)
        if self.routing_scale != 1:
            low, high = self.routing_interval
            skipping = f"{self.routing_drop:.0%} of the tokens skipping blocks"
            parts.append(f"guidance {self.routing_scale:g} by {skipping} for t in [{low:g}, {high:g}]")
        return ", ".join(parts) or "no guidance"

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """Intervals of all guidance that is on."""
        found = [self.interval] * (self.scale != 1) + [self.internal_interval] * (self.internal_scale != 1)
        found += [self.routing_interval] * (self.routing_scale != 1)
        return found if self.weak is None or self.weak.scale == 1 else [*found, self.weak.interval]

    @model_validator(mode="after")
    def _intervals_are_ordered(self) -> Self:
        for prefix in ("", "internal_", "routing_"):
            _check_interval(f"{prefix}interval", getattr(self, f"{prefix}interval"), f"{prefix}scale=1")
        return self


class SolverConfig(Config):
    """The numerical integration from noise to data: on a grid of times, or by `dopri5`, which finds its own steps."""

    name: Literal["euler", "heun", "dopri5", "mean_flow"] = "euler"
    """Solver of order 1, 2 or 5. `dopri5` gives every image steps of its own, whatever else is in the batch. Where
    `lightningdit.prediction` is data, it is refused, and `heun` takes its last step like `euler`. `mean_flow` takes
    each step by its average velocity, which `objective.mean_flow` trains; one is enough."""
    num_steps: int = Field(250, ge=1)
    """Intervals of the grid. Euler evaluates the velocity once in each, Heun twice. The released preset: 249; 1 for
    `mean_flow`."""
    shift: Shift = 1.0
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
