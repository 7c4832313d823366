"""The whole VA-VAE step in fp32 against weights, inputs and outputs of the public implementation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from support.golden import vavae_configs
from torch import Tensor, nn

from vavae.losses.adversarial import DiscriminatorObjective
from vavae.losses.objective import LastLayers, TokenizerObjective, TokenizerOutputs, tokenizer_objective
from vavae.losses.vision_foundation import VisionFoundationLoss
from vavae.models.tokenizer.autoencoder import VAVAE

FILE = Path(__file__).parents[2] / "golden" / "vavae_tiny.safetensors"


class Golden(NamedTuple):
    tensors: Mapping[str, Tensor]
    spec: Mapping[str, Any]
    vavae: VAVAE
    vision_foundation: VisionFoundationLoss
    discriminator: DiscriminatorObjective
    reconstruction: Tensor
    z: Tensor
    losses: TokenizerObjective


def stub_perceptual(images: Tensor, reconstruction: Tensor) -> Tensor:
    """The stand-in that the fixture was made with."""
    return 0.3 * (images - reconstruction).square().mean(dim=(1, 2, 3))


def load(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    start = f"state.{prefix}"
    module.load_state_dict({name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)})


@pytest.fixture(scope="module")
def golden() -> Golden:
    with safe_open(FILE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        spec = json.loads(file.metadata()["spec"])
    tokenizer_config, loss_config = vavae_configs(spec)
    vavae = VAVAE(tokenizer_config)
    load(vavae, {k: v for k, v in tensors.items() if "linear_proj" not in k and "discriminator" not in k})
    vision_foundation = VisionFoundationLoss(
        loss_config.vision_foundation, tokenizer_config.latent_dim, tensors["in.teacher_features"].shape[1]
    )
    load(vision_foundation.projection, tensors, "linear_proj.")
    discriminator = DiscriminatorObjective(loss_config.adversarial)
    load(discriminator.discriminator, tensors, "loss.discriminator.")

    posterior = vavae.encode(tensors["in.x"])
    z = posterior.at(tensors["in.eps"])
    reconstruction = vavae.decode(z)
    alignment = vision_foundation(z, tensors["in.teacher_features"])
    losses = tokenizer_objective(
        loss_config,
        TokenizerOutputs(tensors["in.x"], reconstruction, posterior.kl(), alignment),
        LastLayers(vavae.encoder.conv_out.weight, vavae.decoder.conv_out.weight),
        stub_perceptual,
        discriminator.discriminator.requires_grad_(False),
    )
    losses.objective.backward()
    return Golden(tensors, spec, vavae, vision_foundation, discriminator, reconstruction, z, losses)


def test_posterior_sample_and_reconstruction(golden):
    tensors = golden.tensors
    with torch.no_grad():
        torch.testing.assert_close(golden.vavae.encode(tensors["in.x"]).mean, tensors["out.mean"], rtol=0, atol=1e-5)
        projected = golden.vision_foundation.projection(golden.z)
    torch.testing.assert_close(golden.z, tensors["out.z"], rtol=0, atol=1e-5)
    torch.testing.assert_close(golden.reconstruction, tensors["out.reconstruction"], rtol=0, atol=1e-5)
    torch.testing.assert_close(projected, tensors["out.z_projected"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("term", "output"),
    [
        ("reconstruction", "nll_loss"),
        ("kl", "kl_loss"),
        ("adversarial", "g_loss"),
        ("adversarial_weight", "d_weight"),
        ("vf_weight", "vf_weight"),
        ("total", "total"),
    ],
)
def test_terms(golden, term, output):
    torch.testing.assert_close(golden.losses.terms[term], golden.tensors[f"out.{output}"], rtol=2e-5, atol=1e-5)


def test_parts_of_the_terms(golden):
    terms, tensors = golden.losses.terms, golden.tensors
    torch.testing.assert_close(terms["cosine"] + terms["distance"], tensors["out.vf_loss"], rtol=0, atol=1e-5)
    # The public per-pixel mean holds both parts of the reconstruction loss.
    torch.testing.assert_close(terms["l1"] + terms["perceptual"], tensors["out.rec_loss"], rtol=0, atol=1e-5)
    torch.testing.assert_close(golden.losses.objective.detach(), tensors["out.total"], rtol=1e-5, atol=0)


def test_gradient_norm_of_every_parameter(golden):
    gradients = {name: parameter.grad for name, parameter in golden.vavae.named_parameters()}
    gradients["linear_proj.weight"] = golden.vision_foundation.projection.weight.grad
    assert set(gradients) == set(golden.spec["grad_names"])
    norms = torch.stack([gradients[name].norm() for name in golden.spec["grad_names"]])
    expected = golden.tensors["out.grad_norms"]
    # A shift that the next softmax or the next one-channel group norm takes out has gradient zero, up to rounding.
    shift = torch.tensor([name.endswith("bias") for name in golden.spec["grad_names"]])
    vanishing = shift & (expected < 1e-4)
    assert (norms[vanishing] < 1e-4).all()
    torch.testing.assert_close(norms[~vanishing], expected[~vanishing], rtol=1e-4, atol=0)


def test_generator_step_leaves_the_discriminator_alone(golden):
    assert all(parameter.grad is None for parameter in golden.discriminator.parameters())


def test_discriminator_loss(golden):
    terms = golden.discriminator(golden.tensors["in.x"], golden.reconstruction)
    torch.testing.assert_close(terms.objective, golden.tensors["out.disc_loss"], rtol=0, atol=1e-5)
