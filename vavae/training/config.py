"""The training sections, and `RunConfig`, the one configuration that all jobs of a run share."""

from pydantic import Field, model_validator
from typing_extensions import Self

from vavae.config import Config, runtime
from vavae.data.config import ShardsConfig, StreamConfig
from vavae.diffusion.config import GuidanceConfig, ObjectiveConfig, SolverConfig, TimestepConfig
from vavae.distributed.config import EngineConfig, OptimizerConfig, WorkersConfig
from vavae.dit.config import LightningDiTConfig
from vavae.evaluation.config import EvaluateConfig
from vavae.extraction.config import LatentsConfig
from vavae.losses.config import TokenizerLossConfig
from vavae.sampling.config import SampleConfig
from vavae.storage.config import StorageConfig
from vavae.tokenizer.config import TeacherConfig, TokenizerConfig


class ScheduleConfig(Config):
    """The learning rate over a run; all lengths in images seen."""

    warmup_images: int = Field(0, ge=0)
    """Linear rise from zero."""
    decay_images: int | None = None
    """Images after which a half cosine has come down to zero; null keeps the rate constant."""

    @model_validator(mode="after")
    def _decay_after_warmup(self) -> Self:
        if self.decay_images is not None and self.decay_images <= self.warmup_images:
            raise ValueError(
                f"decay_images={self.decay_images} must be greater than warmup_images={self.warmup_images}"
            )
        return self


class TrainingConfig(Config):
    """One training run of one model."""

    images: int = runtime(ge=1)
    """Budget of images; a finished run whose budget is raised goes on."""
    batch_size: int = Field(256, ge=1)
    """Global batch: images of one step over all workers."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step of the average of the weights that is exported; null exports the weights themselves."""
    engine: EngineConfig = EngineConfig()
    log_images: int = runtime(1024, ge=1)
    """Images between two rows of metrics."""
    checkpoint_images: int = runtime(1_000_000, ge=1)
    """Images between two checkpoints."""
    keep_checkpoints: int = runtime(2, ge=1)
    """Checkpoints that stay in storage, newest first."""

    @property
    def steps(self) -> int:
        """Steps until the budget is reached."""
        return -(-self.images // self.batch_size)


class TokenizerOptimizerConfig(OptimizerConfig):
    """Adam as published for the tokenizer."""

    betas: tuple[float, float] = (0.5, 0.9)


class LightningDiTOptimizerConfig(OptimizerConfig):
    """AdamW as published for the LightningDiT, with gradient clipping for long runs."""

    learning_rate: float = Field(2e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float | None = Field(1.0, gt=0)


class TokenizerTrainingConfig(TrainingConfig):
    """Training of the VA-VAE and its discriminator."""

    optimizer: TokenizerOptimizerConfig = TokenizerOptimizerConfig()
    """Of the generator and, alike, of the discriminator."""


class LightningDiTTrainingConfig(TrainingConfig):
    """Training of the LightningDiT."""

    optimizer: LightningDiTOptimizerConfig = LightningDiTOptimizerConfig()
    ema_decay: float | None = Field(0.9999, gt=0, lt=1)
    """Decay per step of the average of the weights that is exported."""


class RunConfig(Config):
    """Everything about one run, from images to report; each job reads the sections that concern it."""

    name: str = runtime(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the run below `storage.root`."""
    seed: int = Field(0, ge=0)
    storage: StorageConfig = runtime(StorageConfig())
    workers: WorkersConfig = runtime(WorkersConfig())

    shards: ShardsConfig
    stream: StreamConfig = StreamConfig()

    teacher: TeacherConfig = TeacherConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    losses: TokenizerLossConfig = TokenizerLossConfig()
    train_vavae: TokenizerTrainingConfig

    latents: LatentsConfig = LatentsConfig()

    lightningdit: LightningDiTConfig = LightningDiTConfig()
    timesteps: TimestepConfig = TimestepConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train_lightningdit: LightningDiTTrainingConfig

    guidance: GuidanceConfig = GuidanceConfig()
    solver: SolverConfig = SolverConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def grid(self) -> int:
        """Height and width of a latent."""
        return self.shards.image_size // self.tokenizer.downsample

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        factor, size, lanes = self.tokenizer.downsample, self.shards.image_size, self.stream.lanes
        if size % factor:
            raise ValueError(f"shards.image_size={size} is no multiple of {factor}, the tokenizer's downsampling")
        if self.grid % self.lightningdit.patch_size:
            raise ValueError(
                f"lightningdit.patch_size={self.lightningdit.patch_size} does not divide the "
                f"{self.grid} x {self.grid} latent"
            )
        for section in ("train_vavae", "train_lightningdit"):
            batch = getattr(self, section).batch_size
            if batch % lanes:
                raise ValueError(f"{section}.batch_size={batch} is no multiple of stream.lanes={lanes}")
        if self.workers.count > lanes:
            raise ValueError(f"workers.count={self.workers.count} exceeds stream.lanes={lanes}: a worker needs a lane")
        return self
