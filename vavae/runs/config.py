"""The training sections, and `RunConfig`, the one configuration that all jobs of a run share."""

import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from vavae.config import Config, LocalPath, added, describe_size, runtime
from vavae.data.config import ShardsConfig, StreamConfig
from vavae.diffusion.config import GuidanceConfig, ObjectiveConfig, SolverConfig, TimestepConfig
from vavae.distributed.config import EngineConfig, MuonConfig, OptimizerConfig, Precision, WorkersConfig
from vavae.evaluation.config import EvaluateConfig
from vavae.latents.config import LatentsConfig
from vavae.losses.config import TokenizerLossConfig
from vavae.models.dit.config import LightningDiTConfig, count_kept
from vavae.models.tokenizer.config import TeacherConfig, TokenizerConfig
from vavae.runs.phases import Part, TokenizerPhase, TokenizerPhaseConfig, resolve_phases
from vavae.sampling.config import NAME_PATTERN, SampleConfig
from vavae.storage.config import StorageConfig

_WEEK_SECONDS = 7 * 24 * 3600.0
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
    """Whether small or large values are good."""
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
    """Precision of the networks in the forward pass; `bf16` leaves weights, gradients, optimizer and losses in fp32."""
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
    start_from: Annotated[str, Field(min_length=1), LocalPath()] | None = None
    """Weights to begin with: another run's `tokenizer/export`, or a released checkpoint, as a path or a storage URL."""
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
    start_from: Annotated[str, Field(min_length=1), LocalPath()] | None = added(None)
    """Weights to begin with: a `lightningdit/export` of another run on the same latents, as a path or a storage URL.
    Where `lightningdit.average_velocity` is true, they may be of velocities. Null draws them."""
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


class RunConfig(Config):
    """Configuration of one run, from images to report; each job reads the sections that concern it."""

    name: str = runtime(pattern=NAME_PATTERN)
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

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_takes_the_images(cls, data: Any) -> Any:
        sections = [data.get(name, {}) for name in ("shards", "tokenizer")] if isinstance(data, dict) else []
        if not all(isinstance(section, dict) for section in sections) or "channels" not in sections[0]:
            return data
        return {**data, "tokenizer": {"image_channels": sections[0]["channels"], **sections[1]}}

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of a latent."""
        height, width = self.shards.height_and_width
        return height // self.tokenizer.downsample, width // self.tokenizer.downsample

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        return (self.tokenizer.latent_dim, *self.grid)

    def tokenizer_phases(self, images: int = 0) -> list[TokenizerPhase]:
        """Phases of the tokenizer's training, at least one, up to its budget or to more images than that."""
        training = self.train_vavae
        return resolve_phases(training.stages, self.losses, training.frozen, max(training.images, images))

    def collective_seconds(self, job: str) -> float:
        """Seconds that a rank of a training waits for the others in a collective.

        It is longer than the watchdog lets any of them be silent and than a store is asked again, so that those end a
        training, with a reason, and not the collective.
        """
        hang_seconds = getattr(self, job).hang_seconds
        return self.storage.operation_seconds + (_WEEK_SECONDS if hang_seconds is None else hang_seconds)

    @property
    def adversarial(self) -> bool:
        """Whether any phase of the tokenizer's training, within the budget or not, has an adversary."""
        changes = [phase.losses.adversarial.weight for phase in self.train_vavae.stages]
        return any([self.losses.adversarial.weight, *changes])

    @model_validator(mode="after")
    def _phases_can_learn(self) -> Self:
        for phase in self.tokenizer_phases(sys.maxsize):
            for part, term in (("encoder", "vision_foundation"), ("decoder", "adversarial")):
                if part in phase.frozen and getattr(phase.losses, term).weight > 0:
                    raise ValueError(
                        f"train_vavae: from image {phase.from_images:,} on the {part} is frozen, where the adaptive "
                        f"weight of losses.{term} is measured; set losses.{term}.weight=0 in that phase"
                    )
            if {"encoder", "decoder"} <= {*phase.frozen}:
                raise ValueError(f"train_vavae: from image {phase.from_images:,} on nothing is left to train")
        return self

    @property
    def smallest_grid(self) -> tuple[int, int]:
        """Height and width of the smallest latent that an image is encoded to in the tokenizer's training."""
        equivariance = self.losses.equivariance
        changes = [phase.losses.equivariance.small_images for phase in self.train_vavae.stages]
        if equivariance is None or not any([equivariance.small_images, *changes]):
            return self.grid
        return equivariance.grids(self.grid)[0]

    @model_validator(mode="after")
    def _sizes_can_be_trained_on(self) -> Self:
        equivariance = self.losses.equivariance
        if equivariance is None:
            return self
        if self.train_vavae.compile_blocks:
            raise ValueError(
                "train_vavae.compile_blocks=true with losses.equivariance, each of whose sizes would be compiled by "
                "itself: leave it out"
            )
        grids, key = equivariance.grids(self.grid), f"losses.equivariance.min_scale={equivariance.min_scale:g}"
        if not grids:
            raise ValueError(f"{key} leaves no smaller size to a {self.grid[0]} x {self.grid[1]} latent: lower it")
        height, width = (side * self.tokenizer.downsample for side in grids[0])
        needs = {"perceptual": self.losses.perceptual.smallest_side}
        if self.adversarial:
            needs["adversarial"] = self.losses.adversarial.smallest_side
        for name, needed in needs.items():
            if min(height, width) < needed:
                raise ValueError(
                    f"{key} makes images of {height} x {width} pixels, of which losses.{name} needs {needed} along "
                    f"each side: raise it"
                )
        return self

    @model_validator(mode="after")
    def _representation_fits(self) -> Self:
        if self.tokenizer.kind == "kl":
            return self
        for phase in self.tokenizer_phases(sys.maxsize):
            refused = {
                "losses.vision_foundation.weight": phase.losses.vision_foundation.weight,
                "losses.kl_weight": phase.losses.kl_weight,
            }
            for name, value in refused.items():
                if value:
                    raise ValueError(
                        f"{name}={value:g} trains an encoder, and that of tokenizer.kind=representation is frozen: "
                        "set it to 0"
                    )
            if phase.frozen:
                raise ValueError(
                    f"train_vavae.frozen={[*phase.frozen]}: of tokenizer.kind=representation the decoder alone is "
                    "trained: leave frozen out"
                )
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        factor, lanes = self.tokenizer.downsample, self.stream.lanes
        if any(side % factor for side in self.shards.height_and_width):
            size = describe_size(self.shards.image_size)
            raise ValueError(f"shards.image_size={size} is no multiple of {factor}, the tokenizer's downsampling")
        if self.tokenizer.image_channels != self.shards.channels:
            raise ValueError(
                f"tokenizer.image_channels={self.tokenizer.image_channels}, but shards.channels="
                f"{self.shards.channels}: leave the former out"
            )
        channels = self.guidance.channels
        if channels is not None and channels > self.tokenizer.latent_dim:
            raise ValueError(
                f"guidance.channels={channels} exceeds tokenizer.latent_dim={self.tokenizer.latent_dim}: "
                "lower it, or null guides all"
            )
        weak = self.guidance.weak
        if weak is not None and weak.checkpoint_images is not None and self.train_lightningdit.ema_decay is None:
            raise ValueError(
                f"guidance.weak.checkpoint_images={weak.checkpoint_images} guides by the average of the weights, and "
                "the training keeps none: give train_lightningdit.ema_decay, or guidance.weak.model"
            )
        if self.lightningdit.intermediate_head is None:
            self._has_no_intermediate_head()
        self._has_features_to_align_with()
        height, width = self.grid
        if height % self.lightningdit.patch_size or width % self.lightningdit.patch_size:
            raise ValueError(
                f"lightningdit.patch_size={self.lightningdit.patch_size} does not divide the {height} x {width} latent"
            )
        self._check_routing()
        for section in ("train_vavae", "train_lightningdit"):
            batch = getattr(self, section).batch_size
            if batch % lanes:
                raise ValueError(f"{section}.batch_size={batch} is no multiple of stream.lanes={lanes}")
        self.evaluate.check_samples(self.sample.images, self.sample.labels)
        if self.evaluate.frechet_thresholds and self.train_lightningdit.measure is None:
            raise ValueError(
                "evaluate.frechet_thresholds looks at measured checkpoints: set train_lightningdit.measure"
            )
        if self.workers.count > lanes:
            raise ValueError(f"workers.count={self.workers.count} exceeds stream.lanes={lanes}: a worker needs a lane")
        return self

    @property
    def reads_features(self) -> bool:
        """True where the training of the LightningDiT reads features."""
        return self.objective.representation is not None or self.lightningdit.class_token is not None

    @model_validator(mode="after")
    def _class_token_fits(self) -> Self:
        token, features, objective = self.lightningdit.class_token, self.latents.features, self.objective
        if token is None:
            if features is not None and features.class_token:
                raise ValueError(
                    "latents.features.class_token=true is for lightningdit.class_token, and there is none: give it, "
                    "such as {width: 768}, or leave the former out"
                )
            if objective.class_token_weight != ObjectiveConfig.model_fields["class_token_weight"].default:
                raise ValueError(
                    f"objective.class_token_weight={objective.class_token_weight:g} is of lightningdit.class_token, "
                    "and there is none: leave it out"
                )
            return self
        if features is None or not features.class_token:
            raise ValueError(
                "lightningdit.class_token denoises the token that is stored beside the latents: set "
                "latents.features.class_token=true"
            )
        aligned = objective.representation
        if aligned is not None and (aligned.projector == "conv" or aligned.spatial_norm is not None):
            raise ValueError(
                "objective.representation with projector=conv or spatial_norm is of tokens on a grid, and that of "
                "lightningdit.class_token has no place there: set projector=mlp without spatial_norm"
            )
        return self

    @model_validator(mode="after")
    def _prediction_fits(self) -> Self:
        floor, solver = self.objective.data_floor, self.solver.name
        if self.lightningdit.predicts_data and solver == "dopri5":
            raise ValueError(
                f"solver.name={solver} takes velocities at t = 1, where lightningdit.prediction=data has none: set "
                "euler or heun"
            )
        if not self.lightningdit.predicts_data and floor != ObjectiveConfig.model_fields["data_floor"].default:
            raise ValueError(
                f"objective.data_floor={floor:g} is of lightningdit.prediction=data, and it is velocity: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _average_velocities_fit(self) -> Self:
        model, mean_flow = self.lightningdit, self.objective.mean_flow
        if mean_flow is not None and not model.average_velocity:
            raise ValueError("objective.mean_flow trains average velocities: set lightningdit.average_velocity=true")
        if mean_flow is None and model.average_velocity:
            raise ValueError(
                "lightningdit.average_velocity=true is trained by objective.mean_flow alone: give it, such as {}, or "
                "leave the former out"
            )
        if model.guidance_inputs != (mean_flow is not None and mean_flow.max_scale is not None):
            raise ValueError(
                "lightningdit.guidance_inputs=true and objective.mean_flow.max_scale, such as 8, are improved MeanFlow "
                "together: give both or none"
            )
        if self.solver.name == "mean_flow":
            if not model.average_velocity:
                raise ValueError(
                    "solver.name=mean_flow takes steps by average velocities: give lightningdit.average_velocity=true "
                    "and objective.mean_flow, or set another solver"
                )
            by_input = GuidanceConfig(scale=self.guidance.scale, interval=self.guidance.interval)
            scales = model.guidance_inputs and mean_flow is not None and mean_flow.max_scale
            if scales and self.guidance == by_input:
                if not 1 <= self.guidance.scale <= scales:
                    raise ValueError(
                        f"guidance.scale={self.guidance.scale:g} is not between 1 and "
                        f"objective.mean_flow.max_scale={scales:g}, where it is trained: correct it"
                    )
            elif self.guidance.intervals:
                raise ValueError(
                    f"solver.name=mean_flow takes no guidance, and there is {self.guidance.summary}: give its scale to "
                    "objective.mean_flow, which trains guided velocities, and leave guidance out"
                )
        if mean_flow is None:
            return self
        refused = {
            "lightningdit.prediction=data": model.predicts_data,
            "lightningdit.intermediate_head": model.intermediate_head is not None,
            "lightningdit.routing.fuse": model.routing is not None and model.routing.fuse is not None,
            "lightningdit.class_token": model.class_token is not None,
            "train_lightningdit.engine.zero_stage=3": not self.train_lightningdit.engine.has_whole_weights,
        }
        found = next((name for name, is_there in refused.items() if is_there), None)
        if found is not None:
            raise ValueError(f"objective.mean_flow does not go together with {found}: leave one of them out")
        return self

    def _has_no_intermediate_head(self) -> None:
        for section, name in (("guidance", "internal_scale"), ("objective", "intermediate_weight")):
            value = getattr(getattr(self, section), name)
            if value != type(getattr(self, section)).model_fields[name].default:
                raise ValueError(
                    f"{section}.{name}={value:g} is of the intermediate head, and there is none: give "
                    "lightningdit.intermediate_head, or leave it out"
                )

    def _check_routing(self) -> None:
        routing, guidance = self.lightningdit.routing, self.guidance
        rows, columns = self.lightningdit.tokens_of(self.grid)
        tokens = rows * columns
        if routing is not None and count_kept(tokens, routing.drop) == tokens:
            raise ValueError(
                f"lightningdit.routing.drop={routing.drop:g} is less than one of {tokens} tokens: raise it"
            )
        if (
            routing is not None
            and routing.square is not None
            and any(side % routing.square for side in (rows, columns))
        ):
            raise ValueError(
                f"lightningdit.routing.drop={routing.drop:g} draws from squares of {routing.square} x {routing.square} "
                f"tokens, which do not divide {rows} x {columns}: set fuse.structured=false, or another drop"
            )
        if guidance.path_drop and (routing is None or routing.fuse is None or not routing.fuse.path_dropout):
            raise ValueError(
                "guidance.path_drop=true needs a model that learns it: give lightningdit.routing.fuse.path_dropout "
                "above 0, or leave it out"
            )
        if guidance.routing_scale == 1:
            return
        if routing is None or routing.fuse is not None:
            raise ValueError(
                f"guidance.routing_scale={guidance.routing_scale:g} is of tokens that skip blocks: give "
                "lightningdit.routing without fuse, which has guidance.path_drop, or leave it out"
            )
        if count_kept(tokens, guidance.routing_drop) == tokens:
            raise ValueError(f"guidance.routing_drop={guidance.routing_drop:g} is less than one of {tokens} tokens")
        if self.solver.name == "dopri5":
            raise ValueError(
                f"guidance.routing_scale={guidance.routing_scale:g} draws tokens in every evaluation, from which "
                "solver.name=dopri5 would take its error: set solver.name to euler or heun"
            )

    def _has_features_to_align_with(self) -> None:
        features, representation = self.latents.features, self.objective.representation
        height, width = self.grid
        if features is not None and (height % features.patch_size or width % features.patch_size):
            raise ValueError(
                f"latents.features.patch_size={features.patch_size} does not divide the {height} x {width} latent"
            )
        if representation is None:
            return
        if features is None:
            raise ValueError(
                "objective.representation aligns tokens with features that are stored beside the latents, for training "
                "reads no images: give latents.features, such as {teacher: {name: dinov2_base}}"
            )
        if features.patch_size != self.lightningdit.patch_size:
            raise ValueError(
                f"latents.features.patch_size={features.patch_size}, but lightningdit.patch_size="
                f"{self.lightningdit.patch_size}: objective.representation takes one feature for each token, set it so"
            )
        depth, routing = self.lightningdit.shape.depth, self.lightningdit.routing
        if routing is not None and not routing.sees_all_tokens_after(representation.after_block):
            raise ValueError(
                f"objective.representation.after_block={representation.after_block} lies among the blocks that tokens "
                "skip (lightningdit.routing): set it to one before or after them"
            )
        if representation.after_block > depth:
            raise ValueError(
                f"objective.representation.after_block={representation.after_block} exceeds the depth of the "
                f"LightningDiT, {depth}: lower it"
            )
