"""Networks and steps of a training on tensors without memory, to count their FLOPs and activations."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vavae.diffusion.mean_flow import Intervals
from vavae.latents.features import feature_shape
from vavae.losses.adversarial import DiscriminatorObjective
from vavae.losses.augmentation import Augmentation
from vavae.losses.config import AdversarialLossConfig, PerceptualLossConfig
from vavae.losses.feature_discriminator import FrozenFeatures
from vavae.losses.latents import UNTRANSFORMED, LatentNoise, MicroBatchTransforms
from vavae.losses.objective import UNMEASURED, AdaptiveWeights
from vavae.losses.perceptual import build_perceptual
from vavae.models.backbones.load import meta_backbone
from vavae.models.dit.class_token import state_channels
from vavae.models.dit.config import count_kept
from vavae.models.dit.model import LightningDiT
from vavae.models.tokenizer.autoencoder import Encoder
from vavae.models.tokenizer.config import TeacherConfig, TokenizerConfig
from vavae.models.tokenizer.representation import RepresentationEncoder, load_encoder
from vavae.models.tokenizer.teacher import VisionFoundationTeacher
from vavae.runs.config import RunConfig
from vavae.runs.phases import TokenizerPhase
from vavae.training.diffusion_step import FlowMatchingModel
from vavae.training.flops.remembered import RememberedOperators
from vavae.training.tokenizer_step import TokenizerModel

ModuleT = TypeVar("ModuleT", bound=nn.Module | None)


class MetaModel(NamedTuple):
    """Work to be counted, and the modules that do it."""

    work: Callable[[], Any]
    modules: tuple[nn.Module, ...]

    @contextmanager
    def ready(self) -> Iterator[Callable[[], int]]:
        """Give fake tensors to the modules; the work is called within, and returns its FLOPs."""
        operators = _operators()

        def counted_work() -> int:
            before = operators.flops
            self.work()
            return operators.flops - before

        with operators.fakes, operators:
            for module in self.modules:
                if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
                    module.to_empty(device="cpu")
            yield counted_work


@cache
def _operators() -> RememberedOperators:
    """One memory for all models: they share blocks, and the frozen networks."""
    return RememberedOperators(FakeTensorMode(allow_non_fake_inputs=True))


def on_meta(build: Callable[[], ModuleT]) -> ModuleT:
    """Build a module with sizes and without memory."""
    with torch.device("meta"):
        return build()


def images_of(config: RunConfig, count: int) -> Tensor:
    """Empty images [count, C, H, W], to be made when the work is called."""
    return torch.empty(count, config.shards.channels, *config.shards.height_and_width)


def states_of(config: RunConfig, count: int) -> Tensor:
    """Empty states of the LightningDiT, latents joined with class tokens where there are any, to be made likewise."""
    return torch.empty(count, state_channels(config.lightningdit, config.latent_shape[0], config.grid), *config.grid)


def kept_of(config: RunConfig, count: int) -> Tensor | None:
    """Empty indices of the tokens that skip no block, where some do, to be made when the work is called."""
    routing = config.lightningdit.routing
    if routing is None or not routing.drop:
        return None
    kept = count_kept(math.prod(config.lightningdit.tokens_of(config.grid)), routing.drop)
    return torch.empty(count, kept, dtype=torch.int64)


def lightningdit_of(config: RunConfig) -> LightningDiT:
    """Build the LightningDiT of a run; where the number of classes is not known, with one class."""
    model = config.lightningdit
    known = model.with_classes(1 if model.classes is None else model.classes)
    return LightningDiT(known, config.tokenizer.latent_dim, config.grid)


def velocity(config: RunConfig) -> MetaModel:
    """Evaluation of the LightningDiT for one latent."""
    model = on_meta(lambda: lightningdit_of(config))

    def evaluate() -> None:
        model.predict(states_of(config, 1), torch.empty(1), torch.empty(1, dtype=torch.int64), kept_of(config, 1))

    return MetaModel(evaluate, (model,))


def lightningdit_step(config: RunConfig, images: int, spanning: int = 0) -> MetaModel:
    """LightningDiT on one micro-batch, forward and backward.

    Args:
        config: configuration of the run.
        images: images in the micro-batch.
        spanning: images among them over whose interval of time velocities are averaged, with `objective.mean_flow`.
    """
    model = on_meta(lambda: FlowMatchingModel.of(config, lightningdit_of(config)))
    stored = config.latents.features
    # Out here, since timm asks for values, which fake tensors have not, to build a transformer.
    of_an_image = None if model.alignment is None or stored is None else feature_shape(stored, config.grid)

    def step() -> None:
        latents = states_of(config, images)
        features = None if of_an_image is None else torch.empty(images, *of_an_image)
        labels = torch.empty(images, dtype=torch.int64)
        routing = config.lightningdit.routing
        drops = routing is not None and routing.fuse is not None and routing.fuse.path_dropout
        path_dropped = torch.empty(images, dtype=torch.bool) if drops else None
        kept = kept_of(config, images)
        times, intervals, guidance = torch.empty(images), None, None
        if config.objective.mean_flow is not None:
            intervals = Intervals(times, times, torch.empty(spanning, dtype=torch.int64))
        if config.lightningdit.guidance_inputs:
            guidance = torch.empty(images, 3)
        loss, *_ = model(latents, latents, times, labels, kept, path_dropped, guidance, intervals, features, 1.0)
        loss.backward()

    return MetaModel(step, (model,))


class FrozenNetworks(NamedTuple):
    """Networks of the tokenizer's losses that are not trained."""

    teacher: VisionFoundationTeacher
    perceptual: nn.Module | None


@cache
def frozen_networks(teacher: TeacherConfig, perceptual: PerceptualLossConfig) -> FrozenNetworks:
    """Build the frozen networks, once for all steps that share them."""
    built = on_meta(lambda: VisionFoundationTeacher(teacher, meta_backbone))
    return FrozenNetworks(built, on_meta(lambda: build_perceptual(perceptual, built.early_features, meta_backbone)))


@cache
def discriminator_network(config: AdversarialLossConfig) -> FrozenFeatures | None:
    """Build the frozen network of a discriminator, once for all steps that share it; None where it has none."""
    return on_meta(lambda: FrozenFeatures(config.features, meta_backbone)) if config.kind == "features" else None


@cache
def frozen_encoder(tokenizer: TokenizerConfig) -> RepresentationEncoder | None:
    """Build the frozen encoder of a tokenizer, if it has one, once for all that it does."""
    return on_meta(lambda: load_encoder(tokenizer, meta_backbone))


def online_networks(config: RunConfig) -> list[nn.Module]:
    """Build the frozen networks with which the training of the LightningDiT encodes images, see `latents.online`."""
    encoder = frozen_encoder(config.tokenizer)
    networks: list[nn.Module] = [encoder or on_meta(lambda: Encoder(config.tokenizer))]
    features = config.latents.features
    if config.reads_features and features is not None:
        networks.append(on_meta(lambda: VisionFoundationTeacher(features.teacher, meta_backbone)).model)
    return networks


def present(*modules: nn.Module | None) -> tuple[nn.Module, ...]:
    """Those of some modules that there are."""
    return tuple(module for module in modules if module is not None)


def tokenizer_step(
    config: RunConfig,
    phase: TokenizerPhase,
    images: int,
    *,
    adversary: bool,
    measure_weights: bool,
    transforms: MicroBatchTransforms = UNTRANSFORMED,
) -> MetaModel:
    """Tokenizer on one micro-batch: the generator with all its losses, then the discriminator.

    Args:
        config: configuration of the run.
        phase: losses and frozen parts.
        images: images in the micro-batch.
        adversary: the discriminator has started.
        measure_weights: the adaptive weights are measured in this step.
        transforms: of the micro-batch.
    """
    losses, whole_weights = phase.losses, config.train_vavae.engine.has_whole_weights
    grid = config.grid if transforms.images is None else transforms.images.grid
    decoded_grid = grid if transforms.latents is None else transforms.latents.turned_grid
    channels, factor = config.tokenizer.latent_dim, config.tokenizer.downsample
    teacher, perceptual = frozen_networks(config.teacher, losses.perceptual)
    encoder = frozen_encoder(config.tokenizer)
    model = on_meta(lambda: TokenizerModel(config.tokenizer, losses, teacher.feature_dim, whole_weights, encoder))
    model.freeze(phase.frozen)
    judge = on_meta(lambda: DiscriminatorObjective(losses.adversarial, config.shards.channels))
    network, augment = discriminator_network(losses.adversarial) if adversary else None, losses.adversarial.augment

    def view(seen: Tensor) -> Tensor | list[Tensor]:
        if augment is not None:
            uniform = torch.empty(7, images, 1, 1)
            seen = Augmentation(True, True, augment.cutout > 0, uniform, augment.cutout).apply(seen)
        return seen if network is None else network(seen)

    def step() -> None:
        batch = torch.empty(images, config.shards.channels, *(side * factor for side in grid))
        features = partial(teacher, grid=grid) if losses.vision_foundation.weight > 0 else None
        known = UNMEASURED if measure_weights else AdaptiveWeights(torch.ones(()), torch.ones(()))
        judge.requires_grad_(False)
        out = model(
            batch,
            torch.empty(images, channels, *grid),
            features,
            # Copied, for the counter of FLOPs takes no leaf that enters a module and is differentiated for itself.
            None if perceptual is None else lambda real, leaf: perceptual(real, leaf * 1),
            (lambda leaf: judge.discriminator(view(leaf * 1))) if adversary else None,
            known,
            transforms.latents,
            LatentNoise.draw(losses.latent_noise, (images, channels, *decoded_grid), torch.Generator()),
        )
        out.objective.backward()
        if adversary:
            judge.requires_grad_(True)
            judge(out.target, out.reconstruction, (view, view)).objective.backward()

    return MetaModel(step, present(teacher, perceptual, encoder, model, judge, network))
