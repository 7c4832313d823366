"""The tokenizer's objective against the released loss written down plainly, and that against the released numbers.

The reference differentiates every loss by itself, as the public code does: no leaf at the image, no vector-Jacobian
products, no names of ours but those of the configuration.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.golden import vavae_configs
from torch import Tensor, nn

from vavae.losses.adversarial import DiscriminatorObjective
from vavae.losses.config import (
    AdaptiveWeightConfig,
    AdversarialLossConfig,
    PerceptualLossConfig,
    TokenizerLossConfig,
    VisionFoundationLossConfig,
)
from vavae.losses.objective import (
    AdaptiveWeights,
    LastLayers,
    TokenizerObjective,
    TokenizerOutputs,
    tokenizer_objective,
)
from vavae.losses.vision_foundation import VisionFoundationLoss
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TokenizerConfig
from vavae.randomness import torch_generator

GOLDEN = Path(__file__).parents[1] / "golden" / "vavae_tiny.safetensors"


class Networks(nn.Module):
    """All that one training step of the tokenizer uses."""

    def __init__(self, tokenizer: TokenizerConfig, losses: TokenizerLossConfig, feature_dim: int) -> None:
        super().__init__()
        self.vavae = VAVAE(tokenizer)
        self.alignment = VisionFoundationLoss(losses.vision_foundation, tokenizer.latent_dim, feature_dim)
        self.adversary = DiscriminatorObjective(losses.adversarial)

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters that the generator's optimizer holds."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("adversary")}


class Inputs(NamedTuple):
    images: Tensor
    noise: Tensor
    features: Tensor | None
    """None leaves the vision-foundation loss out."""
    adversary_has_started: bool


def stub_perceptual(images: Tensor, reconstruction: Tensor) -> Tensor:
    """The stand-in that the fixture was made with."""
    return 0.3 * (images - reconstruction).square().mean(dim=(1, 2, 3))


# The released loss.


def released_losses(config: TokenizerLossConfig, networks: Networks, inputs: Inputs) -> dict[str, Tensor]:
    """Terms of the released step by the public names; ``total`` and ``disc_loss`` carry graphs."""
    x, batch = inputs.images, len(inputs.images)
    encoded = networks.vavae.quant_conv(networks.vavae.encoder(x))
    mean, logvar = encoded.chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    z = mean + torch.exp(logvar / 2) * inputs.noise
    x_hat = networks.vavae.decoder(networks.vavae.post_quant_conv(z))

    p_loss = stub_perceptual(x, x_hat)[:, None, None, None]
    nll_loss = ((x - x_hat).abs() + config.perceptual.weight * p_loss).sum() / batch
    kl_loss = 0.5 * (mean**2 + torch.exp(logvar) - 1 - logvar).sum() / batch
    terms = {"nll_loss": nll_loss, "kl_loss": kl_loss}
    total = nll_loss + config.kl_weight * kl_loss
    discriminator = networks.adversary.discriminator.main
    if inputs.adversary_has_started:
        g_loss = -discriminator(x_hat).mean()
        last = networks.vavae.decoder.conv_out.weight
        d_weight = config.adversarial.weight * ratio(nll_loss, g_loss, last, config.adaptive.adversarial_max)
        terms |= {"g_loss": g_loss, "d_weight": d_weight}
        total = total + d_weight * g_loss
    if inputs.features is not None:
        vf_loss = released_vf_loss(config.vision_foundation, networks.alignment.projection, z, inputs.features)
        vf_weight = torch.tensor(config.vision_foundation.weight)
        if config.vision_foundation.adaptive:
            last = networks.vavae.encoder.conv_out.weight
            vf_weight = vf_weight * ratio(nll_loss, vf_loss, last, config.adaptive.vision_foundation_max)
        terms |= {"vf_loss": vf_loss, "vf_weight": vf_weight}
        total = total + vf_weight * vf_loss
    real, fake = discriminator(x), discriminator(x_hat.detach())
    disc_loss = {"hinge": released_hinge, "vanilla": released_vanilla}[config.adversarial.loss](real, fake)
    return terms | {"total": total, "disc_loss": disc_loss}


def ratio(nll_loss: Tensor, loss: Tensor, layer: Tensor, maximum: float) -> Tensor:
    (nll_grads,) = torch.autograd.grad(nll_loss, layer, retain_graph=True)
    (grads,) = torch.autograd.grad(loss, layer, retain_graph=True)
    return torch.clamp(torch.norm(nll_grads) / (torch.norm(grads) + 1e-4), 0.0, maximum).detach()


def released_vf_loss(config: VisionFoundationLossConfig, projection: nn.Module, z: Tensor, f: Tensor) -> Tensor:
    if config.projection == "latent_to_teacher":
        z = projection(z)
    else:
        f = projection(f)
    z, f = (v.flatten(2) / v.flatten(2).norm(dim=1, keepdim=True) for v in (z, f))
    mcos = torch.relu(1 - config.cos_margin - (z * f).sum(dim=1)).mean()
    gram_z, gram_f = (torch.einsum("bci,bcj->bij", v, v) for v in (z, f))
    mdms = torch.relu((gram_z - gram_f).abs() - config.distmat_margin).mean()
    return config.distmat_weight * mdms + config.cos_weight * mcos


def released_hinge(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())


def released_vanilla(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (torch.log1p(torch.exp(-real)).mean() + torch.log1p(torch.exp(fake)).mean())


# Ours.


def our_losses(
    config: TokenizerLossConfig, networks: Networks, inputs: Inputs, known: AdaptiveWeights
) -> tuple[TokenizerObjective, Tensor]:
    """The objective, and the discriminator's loss on the same reconstruction."""
    posterior = networks.vavae.encode(inputs.images)
    z = posterior.at(inputs.noise)
    reconstruction = networks.vavae.decode(z)
    alignment = None if inputs.features is None else networks.alignment(z, inputs.features)
    networks.adversary.requires_grad_(False)
    objective = tokenizer_objective(
        config,
        TokenizerOutputs(inputs.images, reconstruction, posterior.kl(), alignment),
        LastLayers(networks.vavae.encoder.conv_out.weight, networks.vavae.decoder.conv_out.weight),
        stub_perceptual,
        networks.adversary.discriminator if inputs.adversary_has_started else None,
        known,
    )
    networks.adversary.requires_grad_(True)
    return objective, networks.adversary(inputs.images, reconstruction).objective


def by_public_names(objective: TokenizerObjective, disc_loss: Tensor, config: TokenizerLossConfig) -> dict[str, Tensor]:
    names = {"nll_loss": "reconstruction", "kl_loss": "kl", "total": "total"}
    if objective.adaptive.adversarial is not None:
        names |= {"g_loss": "adversarial", "d_weight": "adversarial_weight"}
    terms = {public: objective.terms[name] for public, name in names.items()}
    if "vf_weight" in objective.terms:
        distance, cosine = objective.terms["distance"], objective.terms["cosine"]
        vf = config.vision_foundation
        terms |= {
            "vf_weight": objective.terms["vf_weight"],
            "vf_loss": vf.distmat_weight * distance + vf.cos_weight * cosine,
        }
    return terms | {"disc_loss": disc_loss.detach()}


def gradients(loss: Tensor, networks: Networks) -> dict[str, Tensor]:
    """Gradients of all that the generator's optimizer holds; zero where the loss does not reach."""
    parameters = networks.trained()
    found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
    }


# The reference reproduces the fixture, and so do we, measuring the weights or being told them.


class Golden(NamedTuple):
    out: dict[str, Tensor]
    grad_norms: dict[str, Tensor]
    config: TokenizerLossConfig
    networks: Networks
    inputs: Inputs


@pytest.fixture(scope="module")
def golden() -> Golden:
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        spec = json.loads(file.metadata()["spec"])
    tokenizer, config = vavae_configs(spec)
    features = tensors["in.teacher_features"]
    networks = Networks(tokenizer, config, feature_dim=features.shape[1])
    networks.load_state_dict({ours(name): value for name, value in tensors.items() if name.startswith("state.")})
    inputs = Inputs(tensors["in.x"], tensors["in.eps"], features, adversary_has_started=True)
    norms = dict(zip(map(ours, spec["grad_names"]), tensors["out.grad_norms"], strict=True))
    return Golden({k[4:]: v for k, v in tensors.items() if k.startswith("out.")}, norms, config, networks, inputs)


def ours(name: str) -> str:
    """The name within `Networks` of a released tensor."""
    name = name.removeprefix("state.")
    if name.startswith("loss.discriminator"):
        return name.replace("loss.discriminator", "adversary.discriminator")
    return name.replace("linear_proj", "alignment.projection") if name.startswith("linear_proj") else f"vavae.{name}"


def assert_golden(golden: Golden, terms: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    assert terms.keys() == {"nll_loss", "kl_loss", "g_loss", "d_weight", "vf_loss", "vf_weight", "total", "disc_loss"}
    for name, value in terms.items():
        # In float32 a sum over all pixels has no digits to spare below this.
        torch.testing.assert_close(value.detach(), golden.out[name], rtol=5e-6, atol=1e-5, msg=name)
    assert grads.keys() == golden.grad_norms.keys()
    for name, expected in golden.grad_norms.items():
        # A shift that the next softmax or the next one-channel group norm takes out has no gradient but rounding.
        vanishing = name.endswith("bias") and expected < 1e-4
        torch.testing.assert_close(grads[name].norm(), expected, rtol=1e-4, atol=1e-4 if vanishing else 0, msg=name)


def test_reference_gives_the_released_numbers(golden):
    terms = released_losses(golden.config, golden.networks, golden.inputs)
    assert_golden(golden, terms, gradients(terms["total"], golden.networks))


@pytest.mark.parametrize("known", ["neither", "vision_foundation", "adversarial", "both"])
def test_objective_gives_the_released_numbers(golden, known):
    """With the fixture's own adaptive weights handed in, too."""
    weights = AdaptiveWeights(
        golden.out["vf_weight"] / golden.config.vision_foundation.weight if known != "adversarial" else None,
        golden.out["d_weight"] / golden.config.adversarial.weight if known != "vision_foundation" else None,
    )
    objective, disc_loss = our_losses(
        golden.config, golden.networks, golden.inputs, AdaptiveWeights() if known == "neither" else weights
    )
    terms = by_public_names(objective, disc_loss, golden.config)
    assert_golden(golden, terms, gradients(objective.objective, golden.networks))


# Any configuration.

CLAMPS = st.sampled_from([1e-3, 1.0, 30.0, 1e4, 1e8])


@st.composite
def loss_configs(draw: Callable[[Any], Any]) -> TokenizerLossConfig:
    return TokenizerLossConfig(
        vision_foundation=VisionFoundationLossConfig(
            weight=draw(st.sampled_from([0.0, 0.1, 0.5])),
            cos_margin=draw(st.floats(0, 1)),
            distmat_margin=draw(st.floats(0, 0.5)),
            cos_weight=draw(st.sampled_from([0.0, 1.0, 2.0])),
            distmat_weight=draw(st.sampled_from([0.0, 1.0, 3.0])),
            projection=draw(st.sampled_from(["latent_to_teacher", "teacher_to_latent"])),
            adaptive=draw(st.booleans()),
            distmat_tokens_at_once=draw(st.sampled_from([7, 1024])),
        ),
        perceptual=PerceptualLossConfig(weight=draw(st.sampled_from([0.0, 0.7, 1.0]))),
        adversarial=AdversarialLossConfig(
            weight=draw(st.sampled_from([0.5, 2.0])),
            loss=draw(st.sampled_from(["hinge", "vanilla"])),
            channels=16,
            layers=draw(st.integers(1, 2)),
            norm=draw(st.sampled_from(["batch", "group"])),
        ),
        adaptive=AdaptiveWeightConfig(vision_foundation_max=draw(CLAMPS), adversarial_max=draw(CLAMPS)),
        kl_weight=draw(st.sampled_from([0.0, 1e-6, 1e-2])),
    )


@given(
    config=loss_configs(),
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(6, 8), st.integers(6, 8)),
    latent_dim=st.integers(2, 5),
    feature_dim=st.integers(2, 6),
    teacher=st.booleans(),
    adversary_has_started=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_any_configuration_is_the_released_sum(
    config, batch, grid, latent_dim, feature_dim, teacher, adversary_has_started, seed
):
    """Terms and gradients, ours in float32 against the reference in float64."""
    torch.manual_seed(seed)
    sizes = {"channels": 32, "channel_multipliers": (1, 1), "res_blocks": 1, "attention_levels": ()}
    networks = Networks(TokenizerConfig(latent_dim=latent_dim, **sizes), config, feature_dim)
    generator = torch_generator(seed, "inputs")

    def normal(channels: int, factor: int = 1) -> Tensor:
        return torch.randn(batch, channels, factor * grid[0], factor * grid[1], generator=generator)

    inputs = Inputs(normal(3, 2).tanh(), normal(latent_dim), normal(feature_dim), adversary_has_started)
    inputs = inputs if teacher else inputs._replace(features=None)
    double = Inputs(*(value.double() if isinstance(value, Tensor) else value for value in inputs))
    reference = copy.deepcopy(networks).double()

    expected = released_losses(config, reference, double)
    objective, disc_loss = our_losses(config, networks, inputs, AdaptiveWeights())
    terms = by_public_names(objective, disc_loss, config)
    assert terms.keys() == expected.keys()
    for name, value in terms.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-4, abs=1e-6), name
    torch.testing.assert_close(objective.objective.detach(), objective.terms["total"], rtol=1e-6, atol=0)
    ours, theirs = gradients(objective.objective, networks), gradients(expected["total"], reference)
    largest = max(gradient.norm() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-6 * largest, name
