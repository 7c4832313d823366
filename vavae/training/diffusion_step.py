"""One optimizer step of the LightningDiT. Time runs from noise (t = 0) to data (t = 1)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vavae.data.image_stream import ImageMicroBatch
from vavae.data.sample_order import assign_lanes, group_lanes
from vavae.diffusion.config import TIMESTEP_BINS
from vavae.diffusion.flow_matching import (
    FlowMatchingLosses,
    FlowMatchingObjective,
    LinearPath,
    TimestepBins,
    bin_by_timestep,
    sample_timesteps,
)
from vavae.diffusion.guidance import drop_labels
from vavae.diffusion.mean_flow import Intervals, MeanFlowLosses, MeanFlowObjective, draw_guidance
from vavae.diffusion.representation import RepresentationAlignment
from vavae.distributed.build import build_engine
from vavae.distributed.compilation import compile_each
from vavae.distributed.engine import Engine
from vavae.distributed.world import World
from vavae.latents.features import feature_shape
from vavae.latents.online import OnlineEncoder
from vavae.latents.statistics import LatentNormalizer
from vavae.latents.stream import EncodedImageStream, LatentMicroBatch, LatentStream
from vavae.models.dit.class_token import class_token_of, join_class_token
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT
from vavae.models.dit.parametrization import data_of_velocity, velocity_to_data
from vavae.models.dit.routing import draw_tokens
from vavae.randomness import torch_generator
from vavae.runs.config import RunConfig
from vavae.training.collapse import OUTPUT_VARIANCE
from vavae.training.ema import ExponentialMovingAverage, FurtherAverage
from vavae.training.initialize import begin_with, initialized, uninitialized
from vavae.training.logging.stopwatch import Stopwatch
from vavae.training.step import StepResult, StepState, TermSum, compiles, variances


class _Inputs(NamedTuple):
    """Arguments of `FlowMatchingModel.forward`."""

    latents: Tensor
    """Normalized, [S, C, H, W], joined with class tokens where there are any."""
    noise: Tensor
    """Likewise."""
    timesteps: Tensor
    """[S] in [0, 1]."""
    labels: Tensor
    """int64 [S]."""
    keep: Tensor | None
    """Tokens that skip no block, int64 [S, K]; None: all."""
    path_dropped: Tensor | None
    """Images as if all their tokens had skipped, bool [S]; None: no image."""
    guidance: Tensor | None = None
    """Guidance as an input, [S, 3], see `draw_guidance`; None: it is none."""
    intervals: Intervals | None = None
    """Intervals from the timesteps on, over which velocities are averaged; None: they are not."""

    @classmethod
    def joined(cls, parts: "Sequence[_Inputs]") -> "_Inputs":
        """The inputs of several lanes as one."""
        *tensors, intervals = zip(*parts, strict=True)
        # Type: a field is None in all parts or in none.
        fields: list[Any] = [None if each[0] is None else torch.cat(each) for each in tensors]
        fields.append(None if intervals[0] is None else Intervals.joined(intervals))
        return cls(*fields)


class FlowMatchingModel(nn.Module):
    """The LightningDiT with its losses inside one forward, so that DeepSpeed's hooks see one call."""

    def __init__(
        self,
        model: LightningDiT,
        objective: FlowMatchingObjective,
        alignment: RepresentationAlignment | None = None,
        mean_flow: MeanFlowObjective | None = None,
        class_token_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self._objective, self.alignment, self._mean_flow = model, objective, alignment, mean_flow
        self._class_token_weight = class_token_weight

    @classmethod
    def of(cls, config: RunConfig, model: LightningDiT) -> "FlowMatchingModel":
        """A LightningDiT with the losses of a run."""
        representation, alignment = config.objective.representation, None
        if representation is not None:
            assert config.latents.features is not None, "validated by the configuration"
            feature_dim = feature_shape(config.latents.features, config.grid)[1]
            width = model.config.shape.width
            alignment = RepresentationAlignment(representation, width, feature_dim, model.tokens)
        mean_flow = config.objective.mean_flow
        return cls(
            model,
            FlowMatchingObjective(config.objective),
            alignment,
            None if mean_flow is None else MeanFlowObjective(mean_flow, model.null_label),
            config.objective.class_token_weight,
        )

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        labels: Tensor,
        keep: Tensor | None = None,
        path_dropped: Tensor | None = None,
        guidance: Tensor | None = None,
        intervals: Intervals | None = None,
        features: Tensor | None = None,
        representation_weight: float = 0.0,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        """Compute the losses of one micro-batch.

        Args:
            latents: normalized, [S, C, H, W], joined with class tokens where there are any.
            noise: standard normal, likewise.
            timesteps: [S] in [0, 1].
            labels: int64 [S], the null label where a label was dropped.
            keep: tokens that skip no block, int64 [S, K]; None: all.
            path_dropped: images as if all their tokens had skipped, bool [S]; None: no image.
            guidance: that of each image, [S, 3], where it is an input.
            intervals: those from the timesteps on, with an objective of average velocities.
            features: those that tokens are aligned with, [S, N, F], that of the class token first; None aligns nothing.
            representation_weight: weight of that alignment.

        Returns:
            The scalar to differentiate; detached: means by name, the velocity loss of each sample [S], and the
            variances of what the network predicts and of what it should be [2].
        """
        point, floor = LinearPath.sample(latents, noise, timesteps), self._objective.data_floor
        average_velocity = improved = ends = None
        if self._mean_flow is not None:  # before the pass whose activations are kept
            assert intervals is not None, "drawn where average velocities are trained"
            ends, network = intervals.ends, partial(self._average_velocity, keep)
            if guidance is None:
                average_velocity = self._mean_flow.target(network, point, labels, intervals)
            else:
                velocity_of = partial(self._instantaneous_velocity, keep)
                improved = self._mean_flow.improved_target(network, velocity_of, point, labels, intervals, guidance)
        prediction, intermediate, tokens, instantaneous = self.model.predict(
            point.x_t,
            timesteps,
            labels,
            keep,
            path_dropped,
            floor,
            None if self.alignment is None else self.alignment.after_block,
            ends,
            guidance,
        )
        velocity, spread = point.velocity, (prediction, point.velocity)
        if self.model.config.predicts_data:
            velocity = velocity_to_data(latents, point.x_t, timesteps, floor)
            spread = (data_of_velocity(prediction, point.x_t, timesteps, floor), latents)
        losses: FlowMatchingLosses | MeanFlowLosses
        of_latent = slice(self.model.latent_dim)
        if self._mean_flow is not None and average_velocity is not None:
            losses = self._mean_flow(prediction, average_velocity)
        elif self._mean_flow is not None and improved is not None:
            assert instantaneous is not None, "predicted where guidance is an input"
            losses = self._mean_flow.improved(prediction, instantaneous, improved)
        else:
            losses = self._objective(
                prediction[:, of_latent],
                velocity[:, of_latent],
                None if intermediate is None else intermediate[:, of_latent],
            )
        terms = {f"loss/{name}": value.detach().mean() for name, value in losses._asdict().items() if value is not None}
        total = losses.total.mean()
        if self.model.config.class_token is not None:
            of_token = self.model.latent_dim, self.model.config.class_token.width
            predicted, true = (class_token_of(each.float(), *of_token) for each in (prediction, velocity))
            class_token = (predicted - true).square().mean()
            total = total + self._class_token_weight * class_token
            terms |= {"loss/total": total.detach(), "loss/class_token": class_token.detach()}
        if self.alignment is not None:
            representation = self.alignment(tokens, features)
            total = total + representation_weight * representation
            terms["loss/total"] = total.detach()
            if features is not None:
                terms["loss/representation"] = representation.detach()
        return total, terms, losses.velocity.detach(), variances(*(each[:, of_latent] for each in spread))

    def _average_velocity(
        self,
        keep: Tensor | None,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        r: Tensor,
        rows: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """See `TrainedAverageVelocity`; `keep` is that of all images."""
        of_rows = keep if keep is None or rows is None else keep[rows]
        return self.model.predict(x, t, y, of_rows, end=r, guidance=guidance).velocity

    def _instantaneous_velocity(self, keep: Tensor | None, x: Tensor, t: Tensor, y: Tensor, guidance: Tensor) -> Tensor:
        """Velocity [S, C, H, W] at t itself, see `MeanFlowObjective.improved_target`."""
        found = self.model.predict(x, t, y, keep, end=t, guidance=guidance).instantaneous
        assert found is not None, "predicted where guidance is an input"
        return found


class DiffusionStep:
    """One update of the LightningDiT from this rank's micro-batches of latents.

    Args:
        config: configuration of the run.
        model: sizes of the LightningDiT, with its number of classes.
        stream: micro-batches of latents, or of images to encode.
        normalizer: of the latents.
        world: the ranks.
        awaits_checkpoint: initialize nothing, because a checkpoint comes next.
        start: state dict of a LightningDiT whose weights it begins with; None draws them.
        encoder: encodes the images; None of a stream of latents.
    """

    def __init__(
        self,
        config: RunConfig,
        model: LightningDiTConfig,
        stream: LatentStream | EncodedImageStream,
        normalizer: LatentNormalizer,
        world: World,
        awaits_checkpoint: bool = False,
        start: Mapping[str, Tensor] | None = None,
        encoder: OnlineEncoder | None = None,
    ) -> None:
        training = config.train_lightningdit
        self.awaits_checkpoint = awaits_checkpoint
        self._config, self._stream, self._world, self._encoder = config, stream, world, encoder
        lanes, at_once = config.stream.lanes, training.lanes_at_once
        assert at_once != "auto", "lanes_at_once is resolved before the training"
        self.accumulation_steps = assign_lanes(lanes, world.rank, world.size)
        self._groups = group_lanes(lanes, world.rank, world.size, at_once)
        self.stopwatch = Stopwatch(world.device)
        self._normalizer = normalizer.to(world.device)
        dim, grid = config.tokenizer.latent_dim, config.grid

        def build() -> FlowMatchingModel:
            lightningdit = LightningDiT(model, dim, grid)
            if start is not None:
                begin_with(lightningdit, start)
            return FlowMatchingModel.of(config, lightningdit)

        self.model = (
            uninitialized(build, world.device)
            if awaits_checkpoint
            else initialized(config.seed, "lightningdit", build).to(world.device)
        )
        if compiles(training, config.workers, world.device):
            compile_each(self.model.model.all_blocks)
        self._engine = build_engine(
            self.model,
            training.optimizer,
            training.engine,
            training.precision,
            world,
            len(self._groups),
            training.batch_size // lanes * at_once,
        )
        self.engines: dict[str, Engine] = {"lightningdit": self._engine}
        self.ema = ExponentialMovingAverage(self._engine, training.ema_decay, world) if training.ema_decay else None
        self.averages = {
            each.name: FurtherAverage(self._engine, each, training.batch_size, world) for each in training.averages
        }

    def source(self) -> LatentStream | EncodedImageStream:
        """See `Step.source`."""
        return self._stream

    def run(
        self,
        micro_batches: Sequence[LatentMicroBatch | ImageMicroBatch],
        images_seen: int,
        learning_rate: float,
        before_update: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """See `Step.run`."""
        terms = TermSum(len(self._groups), self._world.size)
        bins = TimestepBins(*torch.zeros(2, TIMESTEP_BINS, device=self._world.device))
        spread = torch.zeros(2, dtype=torch.float64, device=self._world.device)
        for group in self._groups:
            with self.stopwatch("forward"):
                latents = [self._encoded(micro_batches[index]) for index in group.indices]
                inputs = _Inputs.joined([self._draw(each, images_seen) for each in latents])
                aligned = self._align(latents, images_seen)
                loss, values, per_sample, of_outputs_and_data = self._engine.forward(*inputs, **aligned)
            with self.stopwatch("backward"):
                self._engine.backward(loss * group.weight)
            terms.add(group.weight, values)
            if group.weight > 0:
                new = bin_by_timestep(per_sample, inputs.timesteps)
                bins = TimestepBins(bins.total + new.total, bins.samples + new.samples)
                spread += of_outputs_and_data
        before_update()
        with self.stopwatch("optimizer"):
            norms = {"gradient_norm/lightningdit": self._engine.update(learning_rate)}
        names = [f"loss_at_timestep/{low / TIMESTEP_BINS:.1f}" for low in range(TIMESTEP_BINS)]
        ratios = dict(zip(names, zip(*bins, strict=True), strict=True))
        return StepResult(terms.terms, norms, {**ratios, OUTPUT_VARIANCE: (spread[0], spread[1])})

    def state_dict(self) -> StepState:
        """See `Step.state_dict`: there is no state besides weights and optimizer."""
        return {}

    def load_state_dict(self, state: StepState) -> None:
        """See `Step.load_state_dict`."""
        assert not state, "a checkpoint of another training"
        self.awaits_checkpoint = False

    def _encoded(self, item: LatentMicroBatch | ImageMicroBatch) -> LatentMicroBatch:
        """Latents of a micro-batch, encoded where it is of images."""
        if isinstance(item, LatentMicroBatch):
            return item
        assert self._encoder is not None, "images come with an encoder"
        return self._encoder.encode(item)

    def _align(self, items: Sequence[LatentMicroBatch], images_seen: int) -> dict[str, Any]:
        """Arguments of the forward pass with the features of micro-batches; none where nothing is aligned."""
        representation = self._config.objective.representation
        weight = 0.0 if representation is None else representation.weight_at(images_seen)
        features = [item.features for item in items if item.features is not None]
        if not weight or not features:
            return {}
        together = torch.cat([each.to(self._world.device, non_blocking=True) for each in features])
        return {"features": together, "representation_weight": weight}

    def _draw(self, item: LatentMicroBatch, images_seen: int) -> _Inputs:
        """Draw all that is random in a micro-batch: latents from their posteriors, noise, timesteps, dropped labels and
        tokens that skip blocks.
        """
        config, device = self._config, self._world.device

        def rng(purpose: str) -> torch.Generator:
            return torch_generator(config.seed, purpose, item.lane, item.step, device=device)

        mean, labels = (tensor.to(device, non_blocking=True) for tensor in (item.mean, item.labels))
        latents = mean
        if item.std is not None:
            std = item.std.to(device, non_blocking=True)
            latents = mean + std * torch.randn(mean.shape, generator=rng("posterior"), device=device)
        noise = torch.randn(mean.shape, generator=rng("noise"), device=device)
        law, count, dimension = config.timesteps, len(labels), mean[0].numel()
        timesteps = sample_timesteps(law, count, images_seen, rng("timesteps"), dimension)
        mean_flow, intervals, guidance = config.objective.mean_flow, None, None
        if mean_flow is not None:
            others = sample_timesteps(law, count, images_seen, rng("interval_end"), dimension)
            on_cpu = torch_generator(config.seed, "interval_length", item.lane, item.step)
            uniform = torch.rand(count, generator=on_cpu)
            intervals = Intervals.between(timesteps, others, uniform, mean_flow.equal_fraction)
            timesteps = intervals.starts
            if mean_flow.max_scale is not None:
                uniform = torch.rand(3, count, generator=rng("guidance_input"), device=device)
                guidance = draw_guidance(mean_flow.max_scale, uniform, intervals)
        null_label = self.model.model.null_label
        labels = drop_labels(labels, null_label, config.objective.label_dropout, rng("label_dropout"))
        routing, keep, path_dropped = self.model.model.config.routing, None, None
        if routing is not None and routing.drop_at(images_seen):
            keep = draw_tokens(routing, self.model.model.tokens, len(labels), rng("routing"))
        if routing is not None and routing.fuse is not None and routing.fuse.path_dropout:
            uniform = torch.rand(len(labels), generator=rng("path_dropout"), device=device)
            path_dropped = uniform < routing.fuse.path_dropout
        latents = self._normalizer.normalize(latents)
        if self.model.model.config.class_token is not None:
            assert item.features is not None, "a stream with features"
            token = item.features[:, 0].to(device, torch.float32)
            of_token = torch.randn(token.shape, generator=rng("class_token_noise"), device=device)
            latents, noise = join_class_token(latents, token), join_class_token(noise, of_token)
        return _Inputs(latents, noise, timesteps, labels, keep, path_dropped, guidance, intervals)
