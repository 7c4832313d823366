"""Recomputed activations: bitwise identical numbers, with less memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from vavae.config import digest
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TokenizerConfig
from vavae.randomness import torch_generator

CONFIG = TokenizerConfig(latent_dim=4, channels=32, channel_multipliers=(1, 2), res_blocks=1, attention_levels=(1,))


def tokenizer(recompute: bool) -> VAVAE:
    torch.manual_seed(0)
    return VAVAE(CONFIG.model_copy(update={"checkpoint_activations": recompute}))


def reconstruct(model: VAVAE) -> Tensor:
    images = torch.randn(2, 3, 16, 16, generator=torch_generator(0, "images"))
    return model.decode(model.encode(images).mode)


def gradients(model: VAVAE, times: int) -> list[Tensor]:
    """Gradients of one graph: at the two layers of the adaptive weights, again and again, then everywhere."""
    reconstruction = reconstruct(model)
    layers = [model.encoder.conv_out.weight, model.decoder.conv_out.weight]
    inner = [
        gradient
        for power in range(1, times + 1)
        for gradient in torch.autograd.grad(reconstruction.pow(power).sum(), layers, retain_graph=True)
    ]
    reconstruction.square().sum().backward()
    return inner + [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("times", [0, 3])
def test_gradients_are_equal_however_often_they_are_taken(times: int) -> None:
    for ours, theirs in zip(gradients(tokenizer(True), times), gradients(tokenizer(False), times), strict=True):
        assert torch.equal(ours, theirs)


@contextmanager
def counted(model: VAVAE) -> Iterator[list[int]]:
    """Values that graphs keep besides parameters."""
    parameters, kept = {parameter.data_ptr() for parameter in model.parameters()}, []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(0 if tensor.data_ptr() in parameters else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def test_a_graph_keeps_less() -> None:
    sizes = []
    for recompute in (True, False):
        model = tokenizer(recompute)
        with counted(model) as kept:
            reconstruct(model)
        sizes.append(sum(kept))
    assert sizes[0] < sizes[1] / 2, sizes


def test_nothing_is_recomputed_without_a_graph() -> None:
    with torch.no_grad():
        assert torch.equal(reconstruct(tokenizer(True)), reconstruct(tokenizer(False)))


def test_it_is_no_part_of_what_a_tokenizer_is() -> None:
    assert digest(tokenizer(True).config) == digest(CONFIG)
