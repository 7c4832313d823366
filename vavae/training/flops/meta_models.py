"""The networks and steps of a training on tensors that have sizes and no memory, for whoever counts what they take."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vavae.diffusion.objective import FlowMatchingObjective
from vavae.losses.adversarial import DiscriminatorObjective
from vavae.losses.objective import UNMEASURED, AdaptiveWeights
from vavae.losses.perceptual import build_perceptual
from vavae.models.backbones.load import meta_backbone
from vavae.models.dit.model import LightningDiT
from vavae.models.tokenizer.teacher import VisionFoundationTeacher
from vavae.runs.config import RunConfig
from vavae.runs.phases import TokenizerPhase
from vavae.training.diffusion_step import FlowMatchingModel
from vavae.training.tokenizer_step import TokenizerModel

ModuleT = TypeVar("ModuleT", bound=nn.Module | None)


class MetaModel(NamedTuple):
    """Some work, and the modules that do it."""

    work: Callable[[], Any]
    modules: tuple[nn.Module, ...]

    @contextmanager
    def ready(self) -> Iterator[Callable[[], Any]]:
        """The work, to be called within."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in self.modules:
                module.to_empty(device="cpu")
            yield self.work


def on_meta(build: Callable[[], ModuleT]) -> ModuleT:
    """A module with sizes and without memory."""
    with torch.device("meta"):
        return build()


def images_of(config: RunConfig, count: int) -> Tensor:
    """Images [count, 3, H, W], to be made when the work is called."""
    return torch.empty(count, 3, config.shards.image_size, config.shards.image_size)


def latents_of(config: RunConfig, count: int) -> Tensor:
    """Latents [count, C, h, w], likewise."""
    return torch.empty(count, config.tokenizer.latent_dim, config.grid, config.grid)


def lightningdit_of(config: RunConfig) -> LightningDiT:
    """The LightningDiT of a run; where the number of classes is not known, with one."""
    model = config.lightningdit
    return LightningDiT(model.with_classes(model.classes or 1), config.tokenizer.latent_dim, config.grid)


def velocity(config: RunConfig) -> MetaModel:
    """One evaluation of the LightningDiT for one latent."""
    model = on_meta(lambda: lightningdit_of(config))
    return MetaModel(lambda: model(latents_of(config, 1), torch.empty(1), torch.empty(1, dtype=torch.int64)), (model,))


def lightningdit_step(config: RunConfig, images: int) -> MetaModel:
    """One micro-batch of so many images, forward and backward."""
    model = on_meta(lambda: FlowMatchingModel(lightningdit_of(config), FlowMatchingObjective(config.objective)))

    def step() -> None:
        latents = latents_of(config, images)
        loss, *_ = model(latents, latents, torch.empty(images), torch.empty(images, dtype=torch.int64))
        loss.backward()

    return MetaModel(step, (model,))


def tokenizer_step(
    config: RunConfig, stage: TokenizerPhase, images: int, *, adversary: bool, measures: bool
) -> MetaModel:
    """One micro-batch of so many images through the generator and all that judges it, then through the discriminator.

    Args:
        config: the run.
        stage: losses and frozen parts.
        images: in the micro-batch.
        adversary: whether it has joined.
        measures: whether the adaptive weights are measured in this step.
    """
    losses, grid = stage.losses, (config.grid, config.grid)
    teacher = on_meta(lambda: VisionFoundationTeacher(config.teacher, meta_backbone))
    perceptual = on_meta(lambda: build_perceptual(losses.perceptual, teacher.early_features, meta_backbone))
    model = on_meta(lambda: TokenizerModel(config.tokenizer, losses, teacher.feature_dim))
    model.freeze(stage.frozen)
    judge = on_meta(lambda: DiscriminatorObjective(losses.adversarial))

    def step() -> None:
        batch = images_of(config, images)
        features = partial(teacher, grid=grid) if losses.vision_foundation.weight > 0 else None
        known = UNMEASURED if measures else AdaptiveWeights(torch.ones(()), torch.ones(()))
        judge.requires_grad_(False)
        out = model(
            batch,
            latents_of(config, images),
            features,
            None if perceptual is None else lambda real, leaf: perceptual(real, _beyond(leaf)),
            (lambda leaf: judge.discriminator(_beyond(leaf))) if adversary else None,
            known,
        )
        out.objective.backward()
        if adversary:
            judge.requires_grad_(True)
            judge(batch, out.reconstruction).objective.backward()

    return MetaModel(step, tuple(module for module in (teacher, perceptual, model, judge) if module is not None))


def _beyond(leaf: Tensor) -> Tensor:
    """The same values; torch's counter of FLOPs takes no leaf that enters a module and is differentiated for itself."""
    return leaf * 1
