"""The composed objective: its terms, and the adaptive weights that it measures, limits, or is given.

That its value and its gradient are those of the released loss is checked in `test_released_loss.py`.
"""

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
from vavae.losses.objective import (
    UNMEASURED,
    AdaptiveWeights,
    DecoderGraph,
    LastLayers,
    TokenizerObjective,
    TokenizerOutputs,
    tokenizer_objective,
)
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

    @property
    def decoder_parameters(self) -> list[Tensor]:
        return [*self.decoder_first.parameters(), *self.decoder_last.parameters()]

    def forward(self, images: Tensor, features: Tensor | None) -> TokenizerOutputs:
        z = self.latent = self.quant(self.encoder_last(torch.tanh(self.first(images))))
        h = nn.functional.interpolate(torch.tanh(self.decoder_first(z)), scale_factor=2.0)
        alignment = None if features is None else self.vision_foundation(z, features)
        return TokenizerOutputs(images, self.decoder_last(h), z.square().sum(dim=(1, 2, 3)), alignment)


def perceptual(images: Tensor, reconstruction: Tensor) -> Tensor:
    return (images.tanh() - reconstruction.tanh()).square().mean(dim=(1, 2, 3))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(0, *shape))


def setting(**changes) -> TokenizerLossConfig:
    values = {
        "vision_foundation": VisionFoundationLossConfig(cos_margin=0.0, distmat_margin=0.0),
        "perceptual": PerceptualLossConfig(weight=0.7),
        "adversarial": AdversarialLossConfig(channels=4, layers=1),
        "kl_weight": 0.01,
    }
    return TokenizerLossConfig(**{**values, **changes})


class Case:
    """One step of a small model, repeatable."""

    def __init__(self, config: TokenizerLossConfig) -> None:
        torch.manual_seed(0)
        self.config, self.model = config, Autoencoder(config)
        self.discriminator = PatchDiscriminator(config.adversarial).requires_grad_(False)
        self.passes = 0
        """How often the reconstruction was differentiated."""

    def objective(
        self, known: AdaptiveWeights = UNMEASURED, *, adversary: bool = True, once: bool = False
    ) -> TokenizerObjective:
        outputs = self.model(draw(2, 3, 16, 16), draw(2, 5, 8, 8))
        outputs.reconstruction.register_hook(self._count)
        self.passes = 0
        discriminator = self.discriminator if adversary else None
        decoder = DecoderGraph(self.model.latent, self.model.decoder_parameters) if once else None
        return tokenizer_objective(self.config, outputs, self.model.layers, perceptual, discriminator, known, decoder)

    def gradients(self, objective: TokenizerObjective, factor: float = 1.0) -> list[Tensor]:
        """Gradients of all parameters."""
        self.model.zero_grad()
        (factor * objective.objective).backward()
        return [parameter.grad.clone() for parameter in self.model.parameters()]

    def _count(self, gradient: Tensor) -> None:
        self.passes += 1


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
    color_values = images[0].numel()
    torch.testing.assert_close(terms["reconstruction"], color_values * (terms["l1"] + 0.7 * distance))
    assert terms["adversarial"] == terms["adversarial_weight"] == 0


def test_without_a_teacher_nothing_is_said_about_alignment():
    config = setting()
    model = Autoencoder(config)
    result = tokenizer_objective(config, model(draw(1, 3, 16, 16), None), model.layers, None, None)
    assert not {"cosine", "distance", "alignment", "vf_weight"} & set(result.terms)
    assert result.adaptive == UNMEASURED


def test_half_precision_outputs_give_float32_losses():
    config = setting()
    model = Autoencoder(config).bfloat16()
    outputs = model(draw(2, 3, 16, 16).bfloat16(), draw(2, 5, 8, 8))
    result = tokenizer_objective(config, outputs, model.layers, perceptual, PatchDiscriminator(config.adversarial))
    assert {term.dtype for name, term in result.terms.items() if name != "kl"} == {torch.float32}
    assert {weight.dtype for weight in result.adaptive} == {torch.float32}
    result.objective.backward()
    assert model.first.weight.grad.isfinite().all()


def test_constant_weights_multiply_the_measured_ones():
    case = Case(setting())
    adaptive, terms = case.objective().adaptive, case.objective().terms
    assert terms["vf_weight"] == case.config.vision_foundation.weight * adaptive.vision_foundation
    assert terms["adversarial_weight"] == case.config.adversarial.weight * adaptive.adversarial
    assert not any(weight.requires_grad or weight.ndim for weight in adaptive)


def test_limits_are_those_of_the_ratios():
    """The constant weight is multiplied afterwards, so the product may pass the limit or stay below it."""
    limited = setting(
        adaptive=AdaptiveWeightConfig(vision_foundation_max=2.0, adversarial_max=3.0),
        adversarial=AdversarialLossConfig(weight=4.0, channels=4, layers=1),
    )
    free, result = Case(setting()).objective(), Case(limited).objective()
    assert free.adaptive.vision_foundation > 2
    assert free.adaptive.adversarial > 3
    assert [weight.item() for weight in result.adaptive] == [2.0, 3.0]
    assert result.terms["vf_weight"].item() == pytest.approx(0.1 * 2)
    assert result.terms["adversarial_weight"].item() == 4 * 3


def test_a_constant_weight_is_neither_measured_nor_known():
    case = Case(setting(vision_foundation=VisionFoundationLossConfig(adaptive=False, weight=0.3, cos_margin=0.0)))
    result = case.objective(AdaptiveWeights(torch.tensor(7.0), torch.tensor(5.0)))
    assert result.terms["vf_weight"].item() == pytest.approx(0.3)
    assert result.adaptive == AdaptiveWeights(None, torch.tensor(5.0))
    assert case.passes == 0


@pytest.mark.parametrize(
    ("known", "passes"), [((), 3), (("vision_foundation",), 2), (("adversarial",), 1), (AdaptiveWeights._fields, 0)]
)
def test_what_is_known_is_not_measured(known, passes):
    """The reconstruction is differentiated once for the one weight and twice for the other, or not at all."""
    case = Case(setting())
    measured = case.objective()
    weights = UNMEASURED._replace(**{name: getattr(measured.adaptive, name) for name in known})
    result = case.objective(weights)
    assert case.passes == passes
    assert result.adaptive == measured.adaptive
    assert result.terms == measured.terms
    parameters = list(case.model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(result.objective, parameters),
        torch.autograd.grad(measured.objective, parameters),
        rtol=0,
        atol=0,
    )


def test_weights_of_an_earlier_step_are_used_as_they_are():
    case = Case(setting())
    result = case.objective(AdaptiveWeights(torch.tensor(5.0), torch.tensor(7.0)))
    terms = result.terms
    assert terms["vf_weight"].item() == pytest.approx(0.1 * 5)
    assert terms["adversarial_weight"].item() == pytest.approx(0.5 * 7)
    vf = terms["cosine"] + terms["distance"]
    kl = case.config.kl_weight * terms["kl"]
    total = terms["reconstruction"] + 0.5 * 7 * terms["adversarial"] + 0.1 * 5 * vf + kl
    torch.testing.assert_close(result.objective.detach(), total)


def test_an_adversary_that_joins_is_measured_alone():
    case = Case(setting())
    before = case.objective(adversary=False).adaptive
    assert before.adversarial is None
    after = case.objective(before).adaptive
    assert after.vision_foundation is before.vision_foundation
    assert after.adversarial == case.objective().adaptive.adversarial


@pytest.mark.parametrize("adversary", [False, True])
def test_the_decoder_is_differentiated_once_without_an_adversary(adversary: bool):
    case = Case(setting())
    twice = case.objective(adversary=adversary)
    expected, passes = case.gradients(twice, factor=0.3), case.passes
    once = case.objective(adversary=adversary, once=True)
    found = case.gradients(once, factor=0.3)
    assert once.objective.item() == pytest.approx(twice.objective.item())
    assert once.adaptive == twice.adaptive
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (passes, case.passes) == ((4, 4) if adversary else (2, 1))
