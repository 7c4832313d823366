"""One optimiser step of the VA-VAE and its discriminator."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from vavae.data.order import Round
from vavae.data.pixels import to_float
from vavae.data.stream import ImageSlice, ImageStream
from vavae.distributed.engine import Engine, build_engine
from vavae.distributed.world import World
from vavae.losses.adversarial import DiscriminatorObjective
from vavae.losses.config import TokenizerLossConfig
from vavae.losses.perceptual import Perceptual, build_perceptual
from vavae.losses.tokenizer import LastLayers, TokenizerOutputs, tokenizer_objective
from vavae.losses.vision_foundation import VisionFoundationLoss
from vavae.randomness import torch_generator
from vavae.tokenizer.autoencoder import VAVAE
from vavae.tokenizer.config import TokenizerConfig
from vavae.tokenizer.teacher import VisionFoundationTeacher
from vavae.training.config import RunConfig
from vavae.training.ema import ExponentialMovingAverage
from vavae.training.initialise import initialised
from vavae.training.step import StepResult, TermSum

Teacher = Callable[[Tensor], Tensor]
Discriminator = Callable[[Tensor], Tensor]


class TokenizerModel(nn.Module):
    """All that the tokenizer's optimiser trains, with all losses inside one forward.

    The adaptive weights differentiate within this forward, where DeepSpeed's hooks on its outputs can't be hit.
    """

    def __init__(self, tokenizer: TokenizerConfig, losses: TokenizerLossConfig, feature_dim: int) -> None:
        super().__init__()
        self.losses = losses
        self.autoencoder = VAVAE(tokenizer)
        self.alignment = VisionFoundationLoss(losses.vision_foundation, tokenizer.latent_dim, feature_dim)

    def forward(
        self,
        images: Tensor,
        noise: Tensor,
        teacher: Teacher | None,
        perceptual: Perceptual | None,
        discriminator: Discriminator | None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The losses of one slice.

        Args:
            images: [S, 3, H, W] in [-1, 1].
            noise: of the posterior, standard normal, [S, C, h, w].
            teacher: images → features [S, C_f, h, w]; None where the vision-foundation loss is off.
            perceptual: distance of two batches of images; None where it is off.
            discriminator: frozen, images → logits; None before its start.

        Returns:
            The scalar to differentiate, the detached reconstruction [S, 3, H, W], and detached terms by name.
        """
        posterior = self.autoencoder.encode(images)
        z = posterior.at(noise)
        reconstruction = self.autoencoder.decode(z)
        alignment = None if teacher is None else self.alignment(z, teacher(images))
        objective = tokenizer_objective(
            self.losses,
            TokenizerOutputs(images, reconstruction, posterior.kl(), alignment),
            LastLayers(self.autoencoder.encoder.conv_out.weight, self.autoencoder.decoder.conv_out.weight),
            perceptual,
            discriminator,
        )
        return objective.objective, reconstruction.detach(), objective.terms


class TokenizerStep:
    """Generator first, then the discriminator on the same reconstructions, each with its own engine.

    Args:
        config: the run.
        stream: slices of images.
        rounds: this rank's share of a step.
        world: the ranks.
    """

    def __init__(self, config: RunConfig, stream: ImageStream, rounds: Sequence[Round], world: World) -> None:
        training, losses = config.train_vavae, config.losses
        self._config, self._stream, self._rounds, self._world = config, stream, rounds, world
        self.teacher = VisionFoundationTeacher(config.teacher).to(world.device)
        self._perceptual = build_perceptual(losses.perceptual, self.teacher.early_features)
        if self._perceptual is not None:
            self._perceptual.to(world.device)
        self.model = initialised(
            config.seed, "tokenizer", lambda: TokenizerModel(config.tokenizer, losses, self.teacher.feature_dim)
        ).to(world.device)
        self._generator = self._engine(self.model)
        self.engines: dict[str, Engine] = {"generator": self._generator}
        self._adversary: Engine | None = None
        if losses.adversarial.weight > 0:
            objective = initialised(config.seed, "discriminator", lambda: DiscriminatorObjective(losses.adversarial))
            self._adversary = self._engine(objective.to(world.device))
            self.engines["discriminator"] = self._adversary
        decay = training.ema_decay
        self.ema = ExponentialMovingAverage(self._generator, decay, world) if decay else None

    def _engine(self, module: nn.Module) -> Engine:
        training = self._config.train_vavae
        slice_size = training.batch_size // self._config.stream.lanes
        return build_engine(
            module,
            training.optimizer,
            training.engine,
            training.precision,
            self._world,
            len(self._rounds),
            slice_size,
        )

    def source(self) -> ImageStream:
        """See `Step.source`."""
        return self._stream

    def run(self, slices: Sequence[ImageSlice], images_seen: int, learning_rate: float) -> StepResult:
        """See `Step.run`."""
        started = images_seen >= self._config.losses.adversarial.start_images
        adversary = self._adversary if started else None
        terms = TermSum(self._rounds, self._world.size)
        pairs = []
        for turn, item in zip(self._rounds, slices, strict=True):
            images = to_float(item.images.to(self._world.device, non_blocking=True))
            loss, reconstruction, values = self._generate(images, item, adversary)
            self._generator.backward(loss * turn.weight)
            terms.add(turn, {_log_name(name): value for name, value in values.items()})
            pairs.append((turn, images, reconstruction))
        norms = {"gradient_norm/generator": self._generator.update(learning_rate)}
        if adversary is not None:
            for turn, images, reconstruction in pairs:
                judged = adversary.forward(images, reconstruction)
                adversary.backward(judged.objective * turn.weight)
                judgement = {"discriminator": judged.objective, "logits_real": judged.real, "logits_fake": judged.fake}
                terms.add(turn, {_log_name(name): value for name, value in judgement.items()})
            norms["gradient_norm/discriminator"] = adversary.update(learning_rate)
        return StepResult(terms.terms, norms)

    def _generate(
        self, images: Tensor, item: ImageSlice, adversary: Engine | None
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """Forward of one slice through the generator and everything that judges it."""
        config = self._config
        shape = (len(images), config.tokenizer.latent_dim, config.grid, config.grid)
        generator = torch_generator(config.seed, "posterior", item.lane, item.step, device=self._world.device)
        noise = torch.randn(shape, generator=generator, device=self._world.device)
        wanted = config.losses.vision_foundation.weight > 0
        teacher = partial(self.teacher, grid=(config.grid, config.grid)) if wanted else None
        if adversary is None:
            return self._generator.forward(images, noise, teacher, self._perceptual, None)
        # The module itself, not the engine: a generator's gradient must not pass the discriminator's hooks.
        judge = adversary.module.discriminator
        judge.requires_grad_(False)
        result = self._generator.forward(images, noise, teacher, self._perceptual, judge)
        judge.requires_grad_(True)
        return result


def _log_name(term: str) -> str:
    """Losses, adaptive weights and the rest are grouped by the first part of their names in the log."""
    if term.endswith("_weight"):
        return f"adaptive_weight/{term.removesuffix('_weight')}"
    return term if term in ("alignment", "logits_real", "logits_fake") else f"loss/{term}"
