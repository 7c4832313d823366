"""Sections of the two trainings: budget, schedule, optimizer, engine, averages of weights, checkpoints."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from vavae.config import Config, ModelAddress, added, runtime
from vavae.distributed.config import EngineConfig, MuonConfig, OptimizerConfig, Precision
from vavae.runs.phases import Part, TokenizerPhaseConfig
from vavae.sampling.config import NAME_PATTERN

WIDEST_STD = 12**-0.5
"""Relative standard deviation of the uniform average of all weights, which no power profile reaches."""


class ScheduleConfig(Config):
    """Learning rate over a training; all lengths in images seen."""

    warmup_images: int = Field(0, ge=0)
    """Linear rise from zero."""
    decay_images: int | None = None
    """Images after which the rate has come down to `final_factor`; null keeps it constant."""
    decay: Literal["cosine", "linear"] = added("cosine")
    """Form of the way down: half a cosine, or a straight line."""
    decay_from_images: int | None = added(None, ge=0)
    """Images at which the way down begins; null begins after the warm-up."""
    final_factor: float = added(0.0, ge=0, le=1)
    """Share of the peak that is left at the end."""

    @property
    def constant_until_images(self) -> int:
        """Images at which the way down begins, where there is one."""
        return self.warmup_images if self.decay_from_images is None else self.decay_from_images

    @model_validator(mode="after")
    def _decay_after_warmup(self) -> Self:
        if self.decay_from_images is not None and self.decay_from_images < self.warmup_images:
            raise ValueError(
                f"decay_from_images={self.decay_from_images} must be at least warmup_images={self.warmup_images}"
            )
        start = "warmup_images" if self.decay_from_images is None else "decay_from_images"
        if self.decay_images is not None and self.decay_images <= self.constant_until_images:
            raise ValueError(
                f"decay_images={self.decay_images} must be greater than {start}={self.constant_until_images}"
            )
        for name in ("decay", "decay_from_images", "final_factor"):
            value = getattr(self, name)
            if self.decay_images is None and value != type(self).model_fields[name].default:
                raise ValueError(f"{name}={value} is of a decay: give decay_images, or leave it out")
        return self


class BestConfig(Config):
    """Rule by which the best checkpoints stay in storage."""

    metric: str = Field(min_length=1)
    """A metric of the log's rows, such as `loss/total`, or of the evaluations that `measure` asks for."""
    mode: Literal["min", "max"] = "min"
    """Direction that is better: small values or large ones."""
    count: int = Field(1, ge=1)


class AverageConfig(Config):
    """A further average of the weights: by a decay, or by EDM2's power profile (arXiv 2312.02696, section 3.2)."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name by which `sample.weights` and others ask for it."""
    decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step, as `ema_decay`."""
    ramp: float | None = Field(None, gt=0)
    """Limit of the half-life, as `ema_ramp`."""
    std: float | None = Field(None, gt=0, lt=WIDEST_STD)
    """Standard deviation of the power profile, relative to the length of the training; 0.05 and 0.1 in EDM2."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        if (self.decay is None) == (self.std is None):
            raise ValueError(f"the average {self.name} takes either a decay or the std of a power profile")
        if self.ramp is not None and self.decay is None:
            raise ValueError(f"ramp={self.ramp:g} limits a decay, and {self.name} is a power profile: leave it out")
        return self


class CheckpointEvaluationConfig(Config):
    """Evaluation of the LightningDiT's checkpoints during its training, as `evaluate` does it at the end.

    Guidance, solver and labels are those of the samples. A checkpoint that is due while another one is evaluated is
    skipped, and until it has been evaluated or skipped it stays in storage.
    """

    every_images: int = Field(ge=1)
    """Images of the training between two evaluations."""
    images: int = Field(2000, ge=2)
    """Generated images; distances on fewer are larger, so they compare with each other alone."""
    weights: str | None = None
    """Name of one of the training's `averages`; null takes the average that is exported."""
    when: Literal["beside", "after"] = "beside"
    """`beside` training, which takes resources besides the workers'; or one checkpoint after another once training is
    over, which takes none, and room in storage for all of them."""
    cpus: float | None = Field(None, gt=0)
    """Cores of the task that evaluates; null takes `workers.cpus`."""
    gpus: float | None = Field(None, gt=0)
    """GPUs, where the workers use any; null takes `workers.gpus`."""
    timeout_seconds: float = Field(3600.0, gt=0)
    """A checkpoint that takes longer is skipped."""


class TrainingConfig(Config):
    """One training run of one model."""

    images: int = runtime(ge=1)
    """Budget of images; a finished training whose budget is raised resumes."""
    batch_size: int = Field(256, ge=1)
    """Global batch: images of one step over all workers."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step of the average of the weights that is exported; null exports the weights themselves."""
    ema_ramp: float | None = added(None, gt=0)
    """Share of the images seen so far that limits the half-life of the average, so that a short training exports no
    initial weights; 0.09 in EDM2. Null limits nothing."""
    precision: Precision = "fp32"
    """Precision of the networks in the forward pass; `bf16` leaves weights, gradients, optimizer and losses in fp32. On
    CPUs it is for those that multiply in it (AMX), with `compile_blocks` above all."""
    engine: EngineConfig = EngineConfig()
    compile_blocks: bool | None = runtime(None)
    """Compile the blocks of the networks with `torch.compile`: those of the transformer; or the tokenizer's residual
    blocks, the teacher's blocks and LPIPS. The first step takes a minute or more. Null does on GPUs that promise no
    bits, where there is a compiler and every worker holds all weights (plain PyTorch, ZeRO 0 to 2)."""
    log_images: int = runtime(1024, ge=1)
    """Images between two rows of metrics."""
    checkpoint_images: int = runtime(1_000_000, ge=1)
    """Images between two checkpoints."""
    keep_checkpoints: int = runtime(2, ge=1)
    """Checkpoints that stay in storage, newest first."""
    keep_best: BestConfig | None = runtime(None)
    """Checkpoints that stay besides the last ones, with the best metrics; null keeps none."""
    preview_images: int | None = runtime(500_000, ge=1)
    """Images between two pictures of what the model makes of the same inputs, in `previews` beside the checkpoints and
    in TensorBoard: held-out images, their reconstructions and four times the difference; or the first samples. Null
    draws none."""
    skip_limit: int = runtime(10, ge=0)
    """Steps in a row that may be skipped because their gradients are not finite, before the training is rolled back to
    its last checkpoint, skipping the data that it met since."""
    rollback_limit: int = runtime(3, ge=0)
    """Rollbacks before the training gives up."""
    spike_deviations: float | None = runtime(8.0, gt=0)
    """A step whose loss lies so many standard deviations above recent ones is logged in detail; null logs none."""
    collapse_limit: int | None = runtime(50, ge=1)
    """Rows of metrics in a row that show a collapse (gradients that fell to almost nothing, outputs that hardly vary, a
    discriminator that is nearly always right) before the training saves a checkpoint and stops, because it does not
    recover by itself; it warns after 20, or sooner if it stops sooner. Null warns only."""
    hang_seconds: float | None = runtime(1800.0, gt=0)
    """A worker that needs longer than this for a step writes its stacks to the log and dies; null lets it wait."""

    @model_validator(mode="after")
    def _compiles_whole_weights(self) -> Self:
        if self.compile_blocks and not self.engine.has_whole_weights:
            raise ValueError(
                "compile_blocks=true with engine.zero_stage=3, which gathers weights between the layers of a block: "
                "lower zero_stage or switch it off"
            )
        return self

    @model_validator(mode="after")
    def _engine_takes_the_optimizer(self) -> Self:
        self.optimizer.check_engine(self.engine)
        return self

    @model_validator(mode="after")
    def _ramps_an_average(self) -> Self:
        if self.ema_ramp is not None and self.ema_decay is None:
            raise ValueError(
                f"ema_ramp={self.ema_ramp:g} ramps the average of the weights: give ema_decay, or set it null"
            )
        return self

    @property
    def average_count(self) -> int:
        """Number of averages of the weights that are kept."""
        return int(self.ema_decay is not None)

    @property
    def steps(self) -> int:
        """Steps until the budget is reached."""
        return -(-self.images // self.batch_size)


class TokenizerOptimizerConfig(OptimizerConfig):
    """Adam as published for the tokenizer."""

    betas: tuple[float, float] = (0.5, 0.9)


class LightningDiTMuonConfig(MuonConfig):
    """Muon for the matrices of the transformer's blocks; embeddings, output layers and projectors are AdamW's."""

    matrices: tuple[str, ...] = Field(("*.blocks.*", "*.fusion.*"), min_length=1)
    others: tuple[str, ...] = ("*_embedder.*", "*.final_layer*", "*.head.projector.*", "alignment.*")
    split_fused: bool = True
    """Orthogonalize queries, keys and values, and both halves of SwiGLU, as matrices of their own."""

    @property
    def fused(self) -> Mapping[str, int]:
        """See `MuonConfig.fused`."""
        return {"*.attn.qkv.weight": 3, "*.mlp.w12.weight": 2} if self.split_fused else {}


class LightningDiTOptimizerConfig(OptimizerConfig):
    """AdamW as published for the LightningDiT, with gradient clipping for long runs."""

    learning_rate: float = Field(2e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float | None = Field(1.0, gt=0)
    muon: LightningDiTMuonConfig | None = added(None)


class TokenizerTrainingConfig(TrainingConfig):
    """Training of the VA-VAE and its discriminator."""

    optimizer: TokenizerOptimizerConfig = TokenizerOptimizerConfig()
    """Optimizer of the generator, and of the discriminator where it has none of its own."""
    discriminator_optimizer: TokenizerOptimizerConfig | None = None
    """Optimizer of the discriminator; its rate follows the same schedule."""
    start_from: ModelAddress | None = None
    """Weights to begin with: another run's `tokenizer/export`, or a released checkpoint, as a path or a storage URL;
    or what `hf-hub:owner/name[/path][@revision]` holds."""
    frozen: tuple[Part, ...] = ()
    """Parts that do not learn."""
    probe_images: int | None = runtime(100_000, ge=1)
    """Images between two probes of the latents of a few held-out images, logged as `latent/...` and
    `equivariance_error/...`; null disables them."""
    stages: tuple[TokenizerPhaseConfig, ...] = ()
    """Phases of the training; each begins with the weights of the one before and fresh moments."""

    @property
    def of_discriminator(self) -> OptimizerConfig:
        """Optimizer of the discriminator."""
        return self.discriminator_optimizer or self.optimizer

    @model_validator(mode="after")
    def _engine_takes_the_discriminator_s_optimizer(self) -> Self:
        self.of_discriminator.check_engine(self.engine, "discriminator_optimizer")
        return self

    @model_validator(mode="after")
    def _phases_rise(self) -> Self:
        before = -1
        for index, phase in enumerate(self.stages):
            if phase.from_images <= before or phase.from_images % self.batch_size:
                raise ValueError(
                    f"stages.{index}.from_images={phase.from_images} must be a multiple of batch_size="
                    f"{self.batch_size}" + (f" above {before}" if index else "")
                )
            before = phase.from_images
        return self


class LightningDiTTrainingConfig(TrainingConfig):
    """Training of the LightningDiT."""

    optimizer: LightningDiTOptimizerConfig = LightningDiTOptimizerConfig()
    start_from: ModelAddress | None = added(None)
    """Weights to begin with: a `lightningdit/export` of another run on the same latents, as a path or a storage URL, or
    `hf-hub:owner/name[@revision]` where `vavae push` has put one. Where `lightningdit.average_velocity` is true, they
    may be of velocities. Null draws them."""
    ema_decay: float | None = Field(0.9999, gt=0, lt=1)
    """Decay per step of the average of the weights that is exported."""
    keep_images: tuple[int, ...] = runtime(())
    """Images seen at checkpoints that are saved besides those at intervals and stay in storage, such as the one that
    `guidance.weak.checkpoint_images` names."""
    averages: tuple[AverageConfig, ...] = added(())
    """Further averages, each exported under its name beside the LightningDiT."""
    average_snapshot_images: int | None = runtime(None, ge=1)
    """Images between two snapshots of the averages by power profiles, which stay in storage, so that `vavae average`
    reconstructs other profiles from them after the training; null keeps none."""
    preview_images: int | None = runtime(5_000_000, ge=1)
    """As for the tokenizer; rarer, because training stands still while the first worker samples."""
    measure: CheckpointEvaluationConfig | None = runtime(None)
    """Null evaluates nothing before the end."""
    lanes_at_once: Annotated[int, Field(ge=1)] | Literal["auto"] = runtime(1)
    """Lanes that a worker takes in one forward and backward pass: fewer, larger passes for a GPU that has room. Only
    the order of sums changes. `auto` takes as many as the plan says fit on GPUs that promise no bits, one elsewhere."""

    @property
    def average_count(self) -> int:
        """Number of averages of the weights that are kept."""
        return super().average_count + len(self.averages)

    @property
    def power_averages(self) -> tuple[AverageConfig, ...]:
        """Averages by power profiles."""
        return tuple(average for average in self.averages if average.std is not None)

    def average(self, name: str) -> AverageConfig | None:
        """The further average of a name; None where there is none."""
        return next((average for average in self.averages if average.name == name), None)

    @model_validator(mode="after")
    def _measures_an_average(self) -> Self:
        if self.measure is None:
            return self
        weights = self.measure.weights
        if weights is None and self.ema_decay is None:
            raise ValueError(
                "measure evaluates an average of the weights: give ema_decay, or measure.weights, or leave measure out"
            )
        if weights is not None and self.average(weights) is None:
            names = ", ".join(average.name for average in self.averages) or "none"
            raise ValueError(f"measure.weights={weights} is no average of this training; there are: {names}")
        return self

    @model_validator(mode="after")
    def _keeps_what_it_saves(self) -> Self:
        for images in self.keep_images:
            if images < 1 or images % self.batch_size:
                raise ValueError(f"keep_images={images} must be a multiple of batch_size={self.batch_size}, from it on")
        return self

    @model_validator(mode="after")
    def _averages_have_their_names(self) -> Self:
        names = [average.name for average in self.averages]
        if len({*names}) < len(names):
            raise ValueError(f"averages have the names {', '.join(names)}: name each once")
        if self.average_snapshot_images is not None and not self.power_averages:
            raise ValueError(
                f"average_snapshot_images={self.average_snapshot_images} keeps averages by power profiles: give "
                "averages with a std, such as {name: narrow, std: 0.05} and {name: wide, std: 0.1}, or leave it out"
            )
        return self
