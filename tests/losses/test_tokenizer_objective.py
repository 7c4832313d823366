"""The composed objective has the value and the gradient of the plain sum, differentiated term by term."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from vavae.losses.adversarial import PatchDiscriminator
from vavae.losses.config import (
    AdaptiveWeightConfig,
    AdversarialLossConfig,
    PerceptualLossConfig,
    TokenizerLossConfig,
    VisionFoundationLossConfig,
)
from vavae.losses.tokenizer import LastLayers, TokenizerOutputs, tokenizer_objective
from vavae.losses.vision_foundation import VisionFoundationLoss
from vavae.randomness import torch_generator


class Autoencoder(nn.Module):
    """Small, with the last layers where the real one has them."""

    def __init__(self, config: TokenizerLossConfig) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, stride=2)
        self.encoder_last = nn.Conv2d(6, 4, 3, padding=1)
        self.quant = nn.Conv2d(4, 4, 1)
        self.decoder_first = nn.Conv2d(4, 6, 1)
        self.decoder_last = nn.Conv2d(6, 3, 3, padding=1)
        self.vision_foundation = VisionFoundationLoss(config.vision_foundation, 4, 5)

    @property
    def layers(self) -> LastLayers:
        return LastLayers(self.encoder_last.weight, self.decoder_last.weight)

    def forward(self, images: Tensor, features: Tensor | None) -> TokenizerOutputs:
        z = self.quant(self.encoder_last(torch.tanh(self.first(images))))
        h = nn.functional.interpolate(torch.tanh(self.decoder_first(z)), scale_factor=2.0)
        alignment = None if features is None else self.vision_foundation(z, features)
        return TokenizerOutputs(images, self.decoder_last(h), z.square().sum(dim=(1, 2, 3)), alignment)


def perceptual(images: Tensor, reconstruction: Tensor) -> Tensor:
    return (images.tanh() - reconstruction.tanh()).square().mean(dim=(1, 2, 3))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(0, *shape))


def naive_total(config, model, outputs, discriminator, *, with_perceptual: bool) -> Tensor:
    """The released form: every loss differentiated by itself at the last layers, then one sum."""
    images, reconstruction, kl, alignment = outputs

    def ratio(loss: Tensor, layer: Tensor, maximum: float) -> Tensor:
        reference, own = (torch.autograd.grad(x, layer, retain_graph=True)[0].norm() for x in (nll, loss))
        return (reference / (own + 1e-4)).clamp(0, maximum).detach()

    per_pixel = (images - reconstruction).abs()
    if with_perceptual:
        per_pixel = per_pixel + config.perceptual.weight * perceptual(images, reconstruction)[:, None, None, None]
    nll = per_pixel.sum() / len(images)
    total = nll + config.kl_weight * kl.sum() / len(images)
    if discriminator is not None:
        g = -discriminator(reconstruction).mean()
        weight = ratio(g, model.layers.decoder, config.adaptive.adversarial_max)
        total = total + config.adversarial.weight * weight * g
    if alignment is not None:
        weight = config.vision_foundation.weight
        if config.vision_foundation.adaptive:
            weight *= ratio(alignment.total, model.layers.encoder, config.adaptive.vision_foundation_max)
        total = total + weight * alignment.total
    return total


def setting(**changes) -> TokenizerLossConfig:
    values = {
        "vision_foundation": VisionFoundationLossConfig(cos_margin=0.0, distmat_margin=0.0),
        "perceptual": PerceptualLossConfig(weight=0.7),
        "adversarial": AdversarialLossConfig(channels=4, layers=1),
        "kl_weight": 0.01,
    }
    return TokenizerLossConfig(**{**values, **changes})


CONFIGS = {
    "adaptive": setting(),
    "constant": setting(vision_foundation=VisionFoundationLossConfig(adaptive=False, cos_margin=0.1)),
    "off": setting(vision_foundation=VisionFoundationLossConfig(weight=0.0)),
    "clamped": setting(adaptive=AdaptiveWeightConfig(vision_foundation_max=2.0, adversarial_max=3.0)),
}


@pytest.mark.parametrize(
    ("config", "adversary", "teacher", "with_perceptual"),
    [*itertools.product(CONFIGS, [True], [True], [True]), *itertools.product(["adaptive"], *[[False, True]] * 3)],
)
def test_value_and_gradient_are_those_of_the_plain_sum(config, adversary, teacher, with_perceptual):
    config = CONFIGS[config]
    torch.manual_seed(0)
    model = Autoencoder(config)
    discriminator = PatchDiscriminator(config.adversarial).requires_grad_(False) if adversary else None
    images, features = draw(2, 3, 16, 16), draw(2, 5, 8, 8) if teacher else None
    expected = naive_total(
        config, model, outputs := model(images, features), discriminator, with_perceptual=with_perceptual
    )
    parameters = [p for name, p in model.named_parameters() if teacher or "vision_foundation" not in name]
    expected_gradients = torch.autograd.grad(expected, parameters)

    outputs = model(images, features)
    result = tokenizer_objective(config, outputs, model.layers, perceptual if with_perceptual else None, discriminator)
    gradients = torch.autograd.grad(result.objective, parameters)
    torch.testing.assert_close(result.objective, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.terms["total"], expected.detach(), rtol=1e-5, atol=0)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4 * reference.abs().max().item())


def test_terms_are_detached_means_over_images():
    config = setting()
    model = Autoencoder(config)
    images = draw(2, 3, 16, 16)
    outputs = model(images, draw(2, 5, 8, 8))
    terms = tokenizer_objective(config, outputs, model.layers, perceptual, None).terms
    assert not any(term.requires_grad or term.ndim for term in terms.values())
    distance = perceptual(images, outputs.reconstruction.detach()).mean()
    torch.testing.assert_close(terms["perceptual"], distance)
    torch.testing.assert_close(terms["l1"], (images - outputs.reconstruction.detach()).abs().mean())
    colour_values = images[0].numel()
    torch.testing.assert_close(terms["reconstruction"], colour_values * (terms["l1"] + 0.7 * distance))
    assert terms["adversarial"] == terms["adversarial_weight"] == 0


def test_without_a_teacher_nothing_is_said_about_alignment():
    config = setting()
    model = Autoencoder(config)
    terms = tokenizer_objective(config, model(draw(1, 3, 16, 16), None), model.layers, None, None).terms
    assert not {"cosine", "distance", "alignment", "vf_weight"} & set(terms)


def test_half_precision_outputs_give_float32_losses():
    config = setting()
    model = Autoencoder(config).bfloat16()
    outputs = model(draw(2, 3, 16, 16).bfloat16(), draw(2, 5, 8, 8))
    result = tokenizer_objective(config, outputs, model.layers, perceptual, PatchDiscriminator(config.adversarial))
    assert {term.dtype for name, term in result.terms.items() if name != "kl"} == {torch.float32}
    result.objective.backward()
    assert model.first.weight.grad.isfinite().all()
