"""One optimizer step of the VA-VAE and its discriminator."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vavae.data.image_stream import ImageMicroBatch, ImageStream
from vavae.data.pixels import to_float
from vavae.data.sample_order import assign_lanes
from vavae.distributed.build import build_engine
from vavae.distributed.compilation import compile_each
from vavae.distributed.config import OptimizerConfig
from vavae.distributed.engine import Engine
from vavae.distributed.sharded_tensors import TensorShard, copy_shards
from vavae.distributed.sync_batch_norm import sync_batch_norm
from vavae.distributed.world import World
from vavae.losses.adversarial import DiscriminatorObjective, View
from vavae.losses.augmentation import Augmentation
from vavae.losses.config import TokenizerLossConfig
from vavae.losses.feature_discriminator import FrozenFeatures, advance_power_iterations
from vavae.losses.latents import LatentNoise, MicroBatchTransforms, Transform
from vavae.losses.objective import (
    UNMEASURED,
    AdaptiveWeights,
    DecoderGraph,
    LastLayers,
    TokenizerOutputs,
    tokenizer_objective,
)
from vavae.losses.perceptual import Perceptual, build_perceptual
from vavae.losses.vision_foundation import VisionFoundationLoss
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TokenizerConfig
from vavae.models.tokenizer.representation import RepresentationEncoder, build_autoencoder
from vavae.models.tokenizer.teacher import VisionFoundationTeacher
from vavae.randomness import torch_generator
from vavae.runs.config import RunConfig
from vavae.runs.phases import Part, TokenizerPhase
from vavae.training.collapse import DISCRIMINATOR_ACCURACY, OUTPUT_VARIANCE
from vavae.training.ema import ExponentialMovingAverage, FurtherAverage
from vavae.training.initialize import ModuleT, initialized, uninitialized
from vavae.training.logging.stopwatch import Stopwatch
from vavae.training.step import StepResult, StepState, StepWeights, TermSum, compiles, variances

Teacher = Callable[[Tensor], Tensor]
Discriminator = Callable[[Tensor], Tensor]


class _Views(NamedTuple):
    """Views of one micro-batch for the discriminator: augmented, then features of its frozen network, if any."""

    of_generator: View
    """View of reconstructions for the generator."""
    of_images: View
    """View of images for the discriminator."""
    of_reconstruction: View
    """View of reconstructions for the discriminator."""


class TokenizerLosses(NamedTuple):
    """Losses of one micro-batch."""

    objective: Tensor
    """The scalar [] to differentiate."""
    target: Tensor
    """Images [S, 3, H, W] that the reconstructions should be."""
    reconstruction: Tensor
    """[S, 3, H, W], detached."""
    terms: dict[str, Tensor]
    """Detached scalars [] by name."""
    adaptive: AdaptiveWeights
    """Adaptive weights that were used."""


class TokenizerModel(nn.Module):
    """Autoencoder and alignment, which one optimizer trains, with all losses inside one forward.

    A frozen encoder is no part of it; beside one there is a decoder alone, and no alignment. The adaptive weights
    differentiate within this forward, where DeepSpeed's hooks on its outputs can't be hit.
    """

    def __init__(
        self,
        tokenizer: TokenizerConfig,
        losses: TokenizerLossConfig,
        feature_dim: int,
        whole_weights: bool = True,
        encoder: RepresentationEncoder | None = None,
    ) -> None:
        super().__init__()
        self.losses, self._whole_weights = losses, whole_weights
        self.autoencoder = build_autoencoder(tokenizer, encoder)
        self.alignment: VisionFoundationLoss | None = None
        if tokenizer.kind == "kl":
            self.alignment = VisionFoundationLoss(losses.vision_foundation, tokenizer.latent_dim, feature_dim)

    def forward(
        self,
        images: Tensor,
        noise: Tensor,
        teacher: Teacher | None,
        perceptual: Perceptual | None,
        discriminator: Discriminator | None,
        known: AdaptiveWeights,
        transform: Transform | None = None,
        latent_noise: LatentNoise | None = None,
    ) -> TokenizerLosses:
        """Compute the losses of one micro-batch; alignment and KL are those of latents as they are encoded.

        Args:
            images: [S, 3, H, W] in [-1, 1].
            noise: of the posterior, standard normal, [S, C, h, w].
            teacher: images → features [S, C_f, h, w]; None where the vision-foundation loss is off.
            perceptual: distance of two batches of images; None where it is off.
            discriminator: frozen, images → logits; None before its start.
            known: adaptive weights that need not be measured.
            transform: of the latents, and of the images that the reconstructions are compared with; None: none.
            latent_noise: on what is decoded; None where it is off.
        """
        posterior = self.autoencoder.encode(images)
        z = posterior.at(noise)
        decoded, target = z, images
        if transform is not None:
            decoded, target = transform.apply(z), transform.apply(images, self.autoencoder.config.downsample)
        if latent_noise is not None:
            decoded = latent_noise.apply(decoded)
        reconstruction = self.autoencoder.decode(decoded)
        alignment = None if teacher is None or self.alignment is None else self.alignment(z, teacher(images))
        objective = tokenizer_objective(
            self.losses,
            TokenizerOutputs(target, reconstruction, posterior.kl(), alignment),
            LastLayers(*self.autoencoder.last_layers),
            perceptual,
            discriminator,
            known,
            DecoderGraph(decoded, self._decoder_parameters())
            if self._whole_weights and alignment is not None
            else None,
        )
        return TokenizerLosses(
            objective.objective, target, reconstruction.detach(), objective.terms, objective.adaptive
        )

    def _decoder_parameters(self) -> list[Tensor]:
        autoencoder = self.autoencoder
        assert isinstance(autoencoder, VAVAE), "an aligned autoencoder"
        layers = (autoencoder.post_quant_conv, autoencoder.decoder)
        return [weights for layer in layers for weights in layer.parameters() if weights.requires_grad]

    def freeze(self, frozen: Sequence[Part]) -> None:
        """Exclude parts from training; the encoder of a representation autoencoder is none of them."""
        autoencoder = self.autoencoder
        if not isinstance(autoencoder, VAVAE) or self.alignment is None:
            assert not frozen, "only the decoder is trained"
            return
        parts: dict[Part, tuple[nn.Module, ...]] = {
            "encoder": (autoencoder.encoder, autoencoder.quant_conv),
            "decoder": (autoencoder.decoder, autoencoder.post_quant_conv),
            "projection": (self.alignment.projection,),
        }
        for part in frozen:
            for module in parts[part]:
                module.requires_grad_(False)


class TokenizerStep:
    """One update of the generator, then one of the discriminator on the same reconstructions, each with its own engine.

    Args:
        config: configuration of the run.
        phase: losses and frozen parts.
        start: weights to begin with instead of random ones; of the phase before, or of another training.
        stream: micro-batches of images.
        world: the ranks.
        awaits_checkpoint: initialize nothing, because a checkpoint comes next.
        encoder: the frozen encoder of a representation autoencoder, on the device of the rank; None for kind `kl`.
    """

    def __init__(
        self,
        config: RunConfig,
        phase: TokenizerPhase,
        start: StepWeights | None,
        stream: ImageStream,
        world: World,
        awaits_checkpoint: bool = False,
        encoder: RepresentationEncoder | None = None,
    ) -> None:
        training, losses = config.train_vavae, phase.losses
        self.awaits_checkpoint = awaits_checkpoint
        self._config, self._losses, self._stream, self._world = config, losses, stream, world
        self.accumulation_steps = assign_lanes(config.stream.lanes, world.rank, world.size)
        self._adaptive_weights: dict[int, AdaptiveWeights] = {}
        self.stopwatch = Stopwatch(world.device)
        self.teacher = VisionFoundationTeacher(config.teacher).to(world.device)
        self._perceptual = build_perceptual(losses.perceptual, self.teacher.early_features)
        if self._perceptual is not None:
            self._perceptual.to(world.device)
        given = {} if start is None else start.engines
        self.model = self._build(
            "tokenizer",
            lambda: TokenizerModel(
                config.tokenizer, losses, self.teacher.feature_dim, training.engine.has_whole_weights, encoder
            ),
            given.get("generator", {}),
        )
        self.model.freeze(phase.frozen)
        # Not with images of many sizes, each of which would be compiled by itself.
        if losses.equivariance is None and compiles(training, config.workers, world.device):
            compile_each(self.model.autoencoder.residual_blocks())
            compile_each([*self.teacher.blocks, *([] if self._perceptual is None else [self._perceptual])])
        self._generator = self._engine(self.model, training.optimizer, given.get("generator", {}))
        self.engines: dict[str, Engine] = {"generator": self._generator}
        self._adversary: Engine | None = None
        self._frozen_features: FrozenFeatures | None = None
        if config.adversarial:
            if losses.adversarial.kind == "features":
                self._frozen_features = FrozenFeatures(losses.adversarial.features).to(world.device)
            judged = given.get("discriminator", {})
            objective: nn.Module = self._build(
                "discriminator", lambda: DiscriminatorObjective(losses.adversarial, config.shards.channels), judged
            )
            if losses.adversarial.norm == "sync_batch":
                objective = sync_batch_norm(objective, world)
            self._adversary = self._engine(objective, training.of_discriminator, judged)
            self.engines["discriminator"] = self._adversary
        decay = training.ema_decay
        self.ema = ExponentialMovingAverage(self._generator, decay, world) if decay else None
        self.averages: dict[str, FurtherAverage] = {}
        if self.ema is not None and start is not None and start.average is not None:
            self.ema.load(start.average)

    def _build(self, purpose: str, build: Callable[[], ModuleT], given: Mapping[str, TensorShard]) -> ModuleT:
        """Build a module, initialized unless a checkpoint or what is given sets all of its values."""
        if self.awaits_checkpoint or given:
            module = uninitialized(build, self._world.device)
            if self.awaits_checkpoint or given.keys() >= module.state_dict().keys():
                return module
        return initialized(self._config.seed, purpose, build).to(self._world.device)

    def _engine(self, module: nn.Module, optimizer: OptimizerConfig, given: Mapping[str, TensorShard]) -> Engine:
        training = self._config.train_vavae
        micro_batch_size = training.batch_size // self._config.stream.lanes
        engine = build_engine(
            module,
            optimizer,
            training.engine,
            training.precision,
            self._world,
            len(self.accumulation_steps),
            micro_batch_size,
        )
        if given:
            # What is not given (a projection, where there was no teacher) stays as it was initialized.
            with engine.restore(updates=0) as parts:
                copy_shards(given, parts)
        return engine

    def source(self) -> ImageStream:
        """See `Step.source`."""
        return self._stream

    def run(
        self,
        micro_batches: Sequence[ImageMicroBatch],
        images_seen: int,
        learning_rate: float,
        before_update: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """See `Step.run`."""
        adversarial = self._losses.adversarial
        started = adversarial.weight > 0 and images_seen >= adversarial.start_images
        adversary = self._adversary if started else None
        statistics = [] if adversary is None else [buffer.clone() for buffer in adversary.module.buffers()]
        terms = TermSum(len(self.accumulation_steps), self._world.size)
        spread, right = torch.zeros(2, 2, dtype=torch.float64, device=self._world.device)
        pairs = []
        for accumulation_step, item in zip(self.accumulation_steps, micro_batches, strict=True):
            with self.stopwatch("forward"):
                images, views = to_float(item.images.to(self._world.device, non_blocking=True)), self._views(item)
                losses = self._generate(images, item, adversary, views)
            with self.stopwatch("backward"):
                self._generator.backward(losses.objective * accumulation_step.weight)
            terms.add(accumulation_step.weight, {_log_name(name): value for name, value in losses.terms.items()})
            if accumulation_step.weight > 0:
                spread += variances(losses.reconstruction, losses.target)
            pairs.append((accumulation_step, losses.target, losses.reconstruction, views))
        before_update()
        with self.stopwatch("optimizer"):
            norm = self._generator.update(learning_rate)
        norms = {"gradient_norm/generator": norm}
        if adversary is not None:
            # A loss that is not finite, so that the discriminator is not updated where the generator was not.
            guard = torch.where(norm.isfinite(), 1.0, torch.nan).to(self._world.device, non_blocking=True)
            for accumulation_step, images, reconstruction, views in pairs:
                with self.stopwatch("forward"):
                    judged = adversary.forward(images, reconstruction, (views.of_images, views.of_reconstruction))
                with self.stopwatch("backward"):
                    adversary.backward(judged.objective * accumulation_step.weight * guard)
                scores = {"discriminator": judged.objective, "logits_real": judged.real, "logits_fake": judged.fake}
                terms.add(accumulation_step.weight, {_log_name(name): value for name, value in scores.items()})
                if accumulation_step.weight > 0:
                    right += judged.right.double()
            advance_power_iterations(adversary.module)
            for buffer, before in zip(adversary.module.buffers(), statistics, strict=True):
                buffer.copy_(torch.where(guard.isfinite(), buffer, before))
            training = self._config.train_vavae
            ratio = training.of_discriminator.learning_rate / training.optimizer.learning_rate
            with self.stopwatch("optimizer"):
                norms["gradient_norm/discriminator"] = adversary.update(learning_rate * ratio)
        ratios = {OUTPUT_VARIANCE: (spread[0], spread[1])}
        if adversary is not None:
            ratios[DISCRIMINATOR_ACCURACY] = (right[0], right[1])
        return StepResult(terms.terms, norms, ratios)

    def _views(self, item: ImageMicroBatch) -> _Views:
        """Draw the augmentations of one micro-batch, and show it with them."""
        config = self._losses.adversarial.augment
        rng = torch_generator(self._config.seed, "discriminator_augment", item.lane, item.step)

        def view(images: Tensor, augmentation: Augmentation | None) -> Tensor | list[Tensor]:
            shown = images if augmentation is None else augmentation.apply(images)
            return shown if self._frozen_features is None else self._frozen_features(shown)

        return _Views(
            *(partial(view, augmentation=Augmentation.draw(config, len(item.images), rng)) for _ in _Views._fields)
        )

    def _generate(
        self, images: Tensor, item: ImageMicroBatch, adversary: Engine | None, views: _Views
    ) -> TokenizerLosses:
        """Run one micro-batch, images [S, 3, H, W] in [-1, 1], through the generator and all losses."""
        config = self._config

        def rng(purpose: str) -> torch.Generator:
            return torch_generator(config.seed, purpose, item.lane, item.step, device=self._world.device)

        on_host = torch_generator(config.seed, "equivariance", item.lane, item.step)  # which must know sizes
        transforms, grid = MicroBatchTransforms.draw(self._losses.equivariance, config.grid, on_host), config.grid
        if transforms.images is not None:
            images, grid = transforms.images.apply(images, config.tokenizer.downsample), transforms.images.grid
        shape = (len(images), config.tokenizer.latent_dim, *grid)
        noise = torch.randn(shape, generator=rng("posterior"), device=self._world.device)
        decoded_grid = grid if transforms.latents is None else transforms.latents.turned_grid
        latent_noise = LatentNoise.draw(self._losses.latent_noise, (*shape[:2], *decoded_grid), rng("latent_noise"))
        wanted = self._losses.vision_foundation.weight > 0
        teacher = partial(self.teacher, grid=grid) if wanted else None
        measure = item.step % self._losses.adaptive.every == 0
        known = UNMEASURED if measure else self._adaptive_weights.get(item.lane, UNMEASURED)
        # The module itself, not the engine: a generator's gradient must not pass the discriminator's hooks.
        discriminator: Any = None if adversary is None else adversary.module.discriminator
        judge = None if discriminator is None else lambda image: discriminator(views.of_generator(image))
        if discriminator is not None:
            discriminator.requires_grad_(False)
        losses: TokenizerLosses = self._generator.forward(
            images, noise, teacher, self._perceptual, judge, known, transforms.latents, latent_noise
        )
        if discriminator is not None:
            discriminator.requires_grad_(True)
        self._adaptive_weights[item.lane] = losses.adaptive
        return losses

    def weights(self) -> StepWeights:
        """Weights on this rank, in place, with which another phase may begin."""
        engines = {name: engine.local_shards() for name, engine in self.engines.items()}
        return StepWeights(engines, None if self.ema is None else self.ema.tensor_shards)

    def state_dict(self) -> StepState:
        """See `Step.state_dict`: the adaptive weights by lane, where they are kept for longer than a step."""
        if self._losses.adaptive.every == 1:
            return {}
        return {
            str(lane): [None if weight is None else weight.item() for weight in weights]
            for lane, weights in self._adaptive_weights.items()
        }

    def load_state_dict(self, state: StepState) -> None:
        """See `Step.load_state_dict`."""
        self.awaits_checkpoint = False
        self._adaptive_weights = {
            int(lane): AdaptiveWeights(
                *(None if weight is None else torch.tensor(weight, device=self._world.device) for weight in weights)
            )
            for lane, weights in state.items()
        }


def _log_name(term: str) -> str:
    """Name a term for the log, where the first part groups losses, adaptive weights and the rest."""
    if term.endswith("_weight"):
        return f"adaptive_weight/{term.removesuffix('_weight')}"
    return term if term in ("alignment", "logits_real", "logits_fake") else f"loss/{term}"
