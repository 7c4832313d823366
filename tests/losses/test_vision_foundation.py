"""Both terms of the vision-foundation loss in closed form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vavae.losses.config import VisionFoundationLossConfig
from vavae.losses.vision_foundation import (
    VisionFoundationLoss,
    marginal_cosine,
    marginal_distance_matrix,
    self_similarity,
)
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


def test_self_similarity_is_within_images():
    f = features(3, 5, 2, 2)
    together = self_similarity(f)
    assert together.shape == (3, 4, 4)
    torch.testing.assert_close(together[1:2], self_similarity(f[1:2]))
    torch.testing.assert_close(together.diagonal(dim1=1, dim2=2), torch.ones(3, 4))


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
