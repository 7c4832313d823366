"""Floating-point operations per image: the networks and steps themselves are run on tensors without memory.

What is counted are multiplications and additions of convolutions and matrix products, two for each pair (Kaplan et al.,
arXiv 2001.08361, count likewise); norms, activations and optimisers are left out, as in published utilisations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vavae.backbones.load import meta_backbone
from vavae.diffusion.objective import FlowMatchingObjective
from vavae.dit.model import LightningDiT
from vavae.losses.adversarial import DiscriminatorObjective
from vavae.losses.perceptual import build_perceptual
from vavae.losses.tokenizer import UNMEASURED, AdaptiveWeights
from vavae.tokenizer.autoencoder import VAVAE
from vavae.tokenizer.teacher import VisionFoundationTeacher
from vavae.training.config import RunConfig
from vavae.training.diffusion_step import FlowMatchingModel
from vavae.training.run import Job
from vavae.training.stages import TokenizerStage
from vavae.training.tokenizer_step import TokenizerModel

ModuleT = TypeVar("ModuleT", bound=nn.Module | None)


@dataclass(frozen=True)
class Flops:
    """Of one image. The two kinds are kept apart because GPUs run them in different arithmetic in fp32."""

    convolution: float = 0.0
    matmul: float = 0.0

    @property
    def total(self) -> float:
        """Both kinds."""
        return self.convolution + self.matmul

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.convolution + other.convolution, self.matmul + other.matmul)

    def __mul__(self, factor: float) -> "Flops":
        return Flops(self.convolution * factor, self.matmul * factor)


def training_flops(config: RunConfig, job: Job, images_seen: int = 0, *, recompute: bool = False) -> Flops:
    """Of one image in a training step: forward and backward of everything that the step runs.

    Args:
        config: the run.
        job: `train_vavae` or `train_lightningdit`.
        images_seen: position in the training; it decides about the tokenizer's stage and adversary.
        recompute: count what `checkpoint_activations` computes again too; utilisation is told without.
    """
    if not recompute:
        config = _without_recomputation(config)
    if job == "train_lightningdit":
        return _lightningdit_step(config)
    assert job == "train_vavae", f"{job} trains nothing"
    stages = config.tokenizer_stages(images_seen + 1)
    stage = next(stage for stage in stages if images_seen < stage.until_images)
    adversarial = stage.losses.adversarial
    adversary = adversarial.weight > 0 and images_seen >= adversarial.start_images
    measured = _tokenizer_step(config, stage, adversary, measures=True)
    every = stage.losses.adaptive.every
    if every == 1:
        return measured
    return (measured + _tokenizer_step(config, stage, adversary, measures=False) * (every - 1)) * (1 / every)


def encoding_flops(config: RunConfig) -> Flops:
    """Of one image through the encoder, without gradients."""
    model = _sized(lambda: VAVAE(config.tokenizer))
    return _count(lambda: model.encode(_image(config)), model)


def decoding_flops(config: RunConfig) -> Flops:
    """Of one latent through the decoder, without gradients."""
    model = _sized(lambda: VAVAE(config.tokenizer))
    return _count(lambda: model.decode(_latent(config)), model)


def velocity_flops(config: RunConfig) -> Flops:
    """Of one evaluation of the LightningDiT for one latent, without gradients."""
    model = _sized(lambda: _lightningdit(config))
    return _count(lambda: model(_latent(config), torch.empty(1), torch.empty(1, dtype=torch.int64)), model)


def _sized(build: Callable[[], ModuleT]) -> ModuleT:
    """A module with sizes and without memory."""
    with torch.device("meta"):
        return build()


def _count(work: Callable[[], Any], *modules: nn.Module) -> Flops:
    """Run some work of modules; attention as plain matrix products, which the counter knows on every device."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in modules:
            module.to_empty(device="cpu")
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work()
    counts = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    convolution = sum(count for operator, count in counts.items() if "conv" in operator)
    return Flops(convolution, sum(counts.values()) - convolution)


def _image(config: RunConfig) -> Tensor:
    return torch.empty(1, 3, config.shards.image_size, config.shards.image_size)


def _latent(config: RunConfig) -> Tensor:
    return torch.empty(1, config.tokenizer.latent_dim, config.grid, config.grid)


def _lightningdit(config: RunConfig) -> LightningDiT:
    """The number of classes, which need not be known, costs no operation."""
    model = config.lightningdit
    return LightningDiT(model.with_classes(model.classes or 1), config.tokenizer.latent_dim, config.grid)


def _lightningdit_step(config: RunConfig) -> Flops:
    model = _sized(lambda: FlowMatchingModel(_lightningdit(config), FlowMatchingObjective(config.objective)))

    def step() -> None:
        latent = _latent(config)
        loss, *_ = model(latent, latent, torch.empty(1), torch.empty(1, dtype=torch.int64))
        loss.backward()

    return _count(step, model)


def _tokenizer_step(config: RunConfig, stage: TokenizerStage, adversary: bool, *, measures: bool) -> Flops:
    """One image through the generator and all that judges it, then through the discriminator."""
    losses, grid = stage.losses, (config.grid, config.grid)
    teacher = _sized(lambda: VisionFoundationTeacher(config.teacher, meta_backbone))
    perceptual = _sized(lambda: build_perceptual(losses.perceptual, teacher.early_features, meta_backbone))
    model = _sized(lambda: TokenizerModel(config.tokenizer, losses, teacher.feature_dim))
    model.freeze(stage.frozen)
    judge = _sized(lambda: DiscriminatorObjective(losses.adversarial))

    def step() -> None:
        images = _image(config)
        features = partial(teacher, grid=grid) if losses.vision_foundation.weight > 0 else None
        known = UNMEASURED if measures else AdaptiveWeights(torch.ones(()), torch.ones(()))
        judge.requires_grad_(False)
        out = model(
            images,
            _latent(config),
            features,
            None if perceptual is None else lambda image, leaf: perceptual(image, _beyond(leaf)),
            (lambda leaf: judge.discriminator(_beyond(leaf))) if adversary else None,
            known,
        )
        out.objective.backward()
        if adversary:
            judge.requires_grad_(True)
            judge(images, out.reconstruction).objective.backward()

    return _count(step, *(module for module in (teacher, perceptual, model, judge) if module is not None))


def _beyond(leaf: Tensor) -> Tensor:
    """The same values; the counter follows no leaf that enters a module and is differentiated for itself."""
    return leaf * 1


def _without_recomputation(config: RunConfig) -> RunConfig:
    sections = {name: getattr(config, name) for name in ("tokenizer", "lightningdit")}
    plain = {name: section.model_copy(update={"checkpoint_activations": False}) for name, section in sections.items()}
    return config.model_copy(update=plain)
