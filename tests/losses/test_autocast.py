"""Losses are computed in float32 under an autocast to bfloat16, whatever the networks do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vavae.diffusion.config import ObjectiveConfig
from vavae.diffusion.flow_matching import FlowMatchingObjective
from vavae.losses.adversarial import generator_loss, hinge, vanilla
from vavae.losses.objective import adaptive_weight
from vavae.losses.perceptual import squared_distances
from vavae.losses.vision_foundation import marginal_cosine, marginal_distance_matrix
from vavae.models.tokenizer.autoencoder import DiagonalGaussian
from vavae.randomness import torch_generator

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda x, y: DiagonalGaussian(x, y).kl().mean(),
    "cosine": lambda x, y: marginal_cosine(torch.cosine_similarity(x, y, dim=1), 0.5),
    "distance matrix": lambda x, y: marginal_distance_matrix(x, y, 0.25),
    "distance matrix in blocks": lambda x, y: marginal_distance_matrix(x, y, 0.25, 4),
    "perceptual": lambda x, y: squared_distances(x, y).sum(1).mean(),
    "generator": lambda x, y: generator_loss(x),
    "hinge": hinge,
    "vanilla": vanilla,
    "flow matching": lambda x, y: FlowMatchingObjective(ObjectiveConfig())(x, y).total.mean(),
    "adaptive weight": lambda x, y: adaptive_weight(x, y, 1e4) * x.sum(),
}


def value_and_gradient(loss: Callable[[Tensor, Tensor], Tensor], autocast: bool) -> tuple[Tensor, Tensor]:
    generator = torch_generator(0, "features")
    x, y = torch.randn(2, 2, 5, 4, 4, generator=generator)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(x, y)
    return value.detach(), *torch.autograd.grad(value, x)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_no_bit(name: str) -> None:
    (value, gradient), plain = (value_and_gradient(LOSSES[name], autocast) for autocast in (True, False))
    assert value.dtype == gradient.dtype == torch.float32
    assert torch.equal(value, plain[0])
    assert torch.equal(gradient, plain[1])


def test_features_in_half_precision_are_compared_in_float32() -> None:
    first, second = torch.randn(2, 1, 3, 4, 4, generator=torch_generator(0, "features")).bfloat16()
    assert torch.equal(squared_distances(first, second), squared_distances(first.float(), second.float()))
