"""Configuration of latents: their computation and storage."""

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from vavae.config import Config, added, runtime
from vavae.distributed.config import Precision
from vavae.models.tokenizer.config import TeacherConfig


class FeaturesConfig(Config):
    """Features of a frozen network, stored beside the latents for `objective.representation`.

    They are those of every training image and, with `latents.flip`, of its mirror image, in bfloat16. With
    `latents.online` the training of the LightningDiT computes them instead, of the images that it reads.
    """

    teacher: TeacherConfig = TeacherConfig(name="dinov2_base")
    """The network, which computes in `latents.precision`. Published: `dinov2_base`."""
    patch_size: int = Field(1, ge=1)
    """Positions of a latent per feature along one side, as many as of a token: `lightningdit.patch_size`."""
    class_token: bool = added(False)
    """Store the teacher's class token before its features, for `lightningdit.class_token`; of a network that has none
    the mean of its features."""


class LatentsConfig(Config):
    """Latents of all image shards."""

    online: bool = added(False)
    """Store nothing but the statistics: the training of the LightningDiT reads the images, and its workers encode them,
    and compute their `features`, in every epoch anew. That saves the space of the latents, which without a posterior
    and with many channels is many times that of the images, and costs the FLOPs of the encoder."""
    flip: bool = True
    """Store the posterior of every image's mirror image too, which the LightningDiT sees half of the time."""
    batch_size: int = Field(64, ge=1)
    """Images encoded at a time, within a shard; fixed, because it is part of the arithmetic."""
    precision: Precision = added("fp32")
    """Precision of the encoder's layers. Published figures are those of `fp32`. `bf16`, made for GPUs, moves latents by
    1 to 2 % of their spread (root mean square, random weights)."""
    compile_blocks: bool | None = runtime(None)
    """Compile the tokenizer's residual blocks with `torch.compile`: latents differ by rounding alone, and the first
    batch of an actor takes a minute or more. Null does on GPUs that promise no bits, where there is a compiler."""
    scale: float | None = Field(None, gt=0)
    """Train the diffusion on latents times this number instead of whitened ones (SD-VAE's is 0.18215); it changes the
    statistics alone, no latent."""
    normalization: Literal["measured", "tokenizer"] = added("measured")
    """Mean and deviation per channel by which the diffusion's latents are whitened: `measured` on the run's training
    images, or those that came with an imported `tokenizer` (its batch normalization, `latents_mean` and `latents_std`,
    `shift_factor` and `scaling_factor`)."""
    statistics: Literal["channel", "position"] = added("channel")
    """Mean and deviation that latents are normalized by: of each channel over all positions, or of each channel at each
    position, as published for representation autoencoders."""
    features: FeaturesConfig | None = added(None)
    """Store the features of a teacher, too: with `dinov2_base` and 16 x 16 latents 393 kB of every image, and as much
    of its mirror image. Null stores none."""
    actors: int = runtime(1, ge=1)
    """Shards encoded at the same time, each in an actor of its own."""
    cpus: float | None = runtime(None, gt=0)
    """CPU cores that Ray reserves for an actor, such as 0.5; whole ones decode images. Null takes `workers.cpus`."""
    gpus: float = runtime(1.0, gt=0, le=1)
    """Share of a GPU for an actor, where `workers.use_gpu`: two actors of 0.5 take turns on one, which pays where a
    single one does not keep it busy."""

    @model_validator(mode="after")
    def _normalized_once(self) -> Self:
        if self.scale is not None and self.normalization != "measured":
            raise ValueError(f"scale={self.scale:g} and normalization={self.normalization} are two ways: leave one out")
        return self

    @model_validator(mode="after")
    def _statistics_are_measured(self) -> Self:
        if self.statistics == "channel":
            return self
        for name, value in (("scale", self.scale), ("normalization", self.normalization)):
            if value not in (None, "measured"):
                raise ValueError(
                    f"{name}={value} stands in for statistics of channels, and statistics={self.statistics}: leave one "
                    "out"
                )
        return self
