"""`RunConfig`, the one configuration that all jobs of a run share."""

import math
import sys
from typing import Any

from pydantic import Field, model_validator
from typing_extensions import Self

from vavae.config import Config, describe_size, runtime
from vavae.data.config import ShardsConfig, StreamConfig
from vavae.diffusion.config import GuidanceConfig, ObjectiveConfig, SolverConfig, TimestepConfig
from vavae.distributed.config import WorkersConfig
from vavae.evaluation.config import EvaluateConfig
from vavae.latents.config import LatentsConfig
from vavae.losses.config import TokenizerLossConfig
from vavae.models.dit.config import LightningDiTConfig, count_kept
from vavae.models.tokenizer.config import TeacherConfig, TokenizerConfig
from vavae.runs.phases import TokenizerPhase, resolve_phases
from vavae.runs.training_config import LightningDiTTrainingConfig, TokenizerTrainingConfig
from vavae.sampling.config import NAME_PATTERN, SampleConfig
from vavae.storage.config import StorageConfig
from vavae.tracking.config import TrackerName

_WEEK_SECONDS = 7 * 24 * 3600.0


class RunConfig(Config):
    """Configuration of one run, from images to report; each job reads the sections that concern it."""

    name: str = runtime(pattern=NAME_PATTERN)
    """Folder of the run below `storage.root`."""
    seed: int = Field(0, ge=0)
    storage: StorageConfig = runtime(StorageConfig())
    workers: WorkersConfig = runtime(WorkersConfig())
    tracking: tuple[TrackerName, ...] = runtime(("tensorboard",))
    """Trackers that show the trainings and the evaluation, besides the files of the run: `tensorboard`, `wandb`,
    `mlflow`, `trackio`. Servers, projects and keys are in the environment of the machines."""

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
        """True where the training of the LightningDiT needs features of the images, stored ones or its own."""
        return self.objective.representation is not None or self.lightningdit.class_token is not None

    @property
    def feature_steps(self) -> float | None:
        """Steps of the training of the LightningDiT that need features of the images; None where none do."""
        if not self.reads_features:
            return None
        representation, stop = self.objective.representation, math.inf
        if self.lightningdit.class_token is None and representation is not None:
            stop = math.inf if representation.stop_images is None else representation.stop_images
        return stop / self.train_lightningdit.batch_size

    @model_validator(mode="after")
    def _measures_latents_that_are_stored(self) -> Self:
        if self.latents.online and self.evaluate.latent_space is not None:
            raise ValueError(
                "evaluate.latent_space measures stored latents, and latents.online=true stores none: set one of them "
                "to null or false"
            )
        return self

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
                "lightningdit.class_token denoises a token of the images' features: set "
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
                "objective.representation aligns tokens with features of the images: give latents.features, such as "
                "{teacher: {name: dinov2_base}}"
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
