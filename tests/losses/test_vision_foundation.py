"""Both terms of the vision-foundation loss in closed form."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vavae.losses.config import VisionFoundationLossConfig
from vavae.losses.vision_foundation import VisionFoundationLoss, marginal_cosine, marginal_distance_matrix
from vavae.randomness import torch_generator


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "features"))


@given(cosine=st.floats(-1, 1), margin=st.floats(0, 2))
@settings(deadline=None)
def test_marginal_cosine_is_the_shortfall(cosine, margin):
    expected = max(0.0, 1 - margin - cosine)
    assert marginal_cosine(torch.full((2, 3, 3), cosine), margin).item() == pytest.approx(expected, abs=1e-6)


def test_half_of_the_pairs_differ_by_one():
    # Two positions: the latents agree (cosine 1), the features are orthogonal (cosine 0); the diagonal is 1 in both.
    z = torch.tensor([[1.0, 5.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    f = torch.tensor([[2.0, 0.0], [0.0, 3.0]]).view(1, 2, 1, 2)
    assert marginal_distance_matrix(z, f, margin=0.0).item() == pytest.approx(0.5)
    assert marginal_distance_matrix(z, f, margin=0.25).item() == pytest.approx(0.5 * 0.75)
    assert marginal_distance_matrix(z, f, margin=1.0).item() == 0.0


def test_distances_ignore_rotation_and_length_of_features():
    f = features(2, 6, 3, 4)
    rotation, _ = torch.linalg.qr(features(6, 6, seed=1))
    lengths = features(2, 1, 3, 4, seed=2).exp()
    turned = torch.einsum("cd,bdhw->bchw", rotation, f) * lengths
    assert marginal_distance_matrix(turned, f, margin=0.0).item() == pytest.approx(0.0, abs=1e-6)


def test_distances_are_those_within_images():
    z, f = features(3, 5, 2, 2), features(3, 4, 2, 2, seed=1)
    each = [marginal_distance_matrix(z[i : i + 1], f[i : i + 1], margin=0.1) for i in range(3)]
    torch.testing.assert_close(marginal_distance_matrix(z, f, margin=0.1), torch.stack(each).mean())


@pytest.mark.parametrize(
    ("sign", "cosine", "alignment"), [(1.0, 0.0, 1.0), (-1.0, 1.5, -1.0)], ids=["aligned", "opposed"]
)
def test_projected_latents_are_compared(sign, cosine, alignment):
    loss = VisionFoundationLoss(VisionFoundationLossConfig(), latent_dim=3, feature_dim=5)
    z = features(2, 3, 2, 2)
    terms = loss(z, sign * loss.projection(z).detach())
    assert terms.cosine.item() == pytest.approx(cosine, abs=1e-5)
    assert terms.distance.item() == 0.0
    assert terms.alignment.item() == pytest.approx(alignment, abs=1e-5)


@pytest.mark.parametrize("projection", ["latent_to_teacher", "teacher_to_latent"])
def test_total_is_the_weighted_sum_and_trains_the_projection(projection):
    config = VisionFoundationLossConfig(
        projection=projection, cos_weight=2.0, distmat_weight=3.0, cos_margin=0.0, distmat_margin=0.0
    )
    loss = VisionFoundationLoss(config, latent_dim=3, feature_dim=5)
    z = features(2, 3, 2, 2).requires_grad_()
    terms = loss(z, features(2, 5, 2, 2, seed=1))
    torch.testing.assert_close(terms.total.detach(), 2 * terms.cosine + 3 * terms.distance)
    assert not terms.cosine.requires_grad and not terms.distance.requires_grad and not terms.alignment.requires_grad  # noqa: PT018
    terms.total.backward()
    assert loss.projection.weight.grad.abs().sum() > 0
    assert z.grad.abs().sum() > 0
    assert (loss.projection.bias is None) == (projection == "latent_to_teacher")


def test_different_grids_are_refused():
    loss = VisionFoundationLoss(VisionFoundationLossConfig(), latent_dim=3, feature_dim=5)
    with pytest.raises(AssertionError, match="one grid"):
        loss(features(1, 3, 2, 2), features(1, 5, 2, 3))


@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    tokens_at_once=st.integers(1, 40),
    margin=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_blocks_change_neither_value_nor_gradient(height, width, tokens_at_once, margin, seed):
    z, f = features(2, 3, height, width, seed=seed), features(2, 5, height, width, seed=seed + 10)
    whole, blocks = (
        torch.autograd.functional.vjp(
            lambda z, f, at_once=at_once: marginal_distance_matrix(z, f, margin, at_once), (z, f), torch.tensor(7.0)
        )
        for at_once in (None, tokens_at_once)
    )
    torch.testing.assert_close(blocks, whole, rtol=1e-6, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor has that any operation makes, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.elements = max(
            [self.elements, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))]
        )
        return result


class Footprint(NamedTuple):
    """Elements of the largest tensor."""

    made: int
    """By any operation, forward or backward."""
    kept: int
    """From the forward pass for the backward pass."""


def footprint(side: int, tokens_at_once: int) -> Footprint:
    """Memory that the loss of two images takes, with eight features at side² positions."""
    loss = VisionFoundationLoss(VisionFoundationLossConfig(distmat_tokens_at_once=tokens_at_once), 4, 8)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = loss(features(2, 4, side, side), features(2, 8, side, side, seed=1)).total
        total.backward()
    return Footprint(largest.elements, max(kept))


def test_blocks_bound_the_memory():
    """A grid of 256 positions in the memory of one of 64, of which nothing is kept but the features themselves."""
    assert footprint(side=16, tokens_at_once=256) == Footprint(made=2 * 256**2, kept=2 * 256**2)
    assert footprint(side=16, tokens_at_once=64) == Footprint(made=2 * 64**2, kept=2 * 8 * 256)
    assert footprint(side=8, tokens_at_once=64).made == 2 * 64**2


def test_blocks_can_be_differentiated_twice():
    """As the step does: first for the adaptive weight, then as part of the objective."""
    z, f = features(2, 3, 4, 4), features(2, 5, 4, 4, seed=1)
    gradients = []
    for at_once in (16, 5):
        torch.manual_seed(0)
        loss = VisionFoundationLoss(VisionFoundationLossConfig(distmat_tokens_at_once=at_once), 3, 5)
        total = loss(z, f).total
        (first,) = torch.autograd.grad(total, loss.projection.weight, retain_graph=True)
        (first.norm().detach() * total).backward()
        gradients.append((first, loss.projection.weight.grad))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)
