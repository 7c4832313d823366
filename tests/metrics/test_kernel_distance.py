"""The kernel distance: by hand, by its invariances, and beside torchmetrics and torch-fidelity."""

import pytest
import torch
from torch import Tensor

import vavae.torchvision_compat  # noqa: F401  (before torchmetrics and torch-fidelity)

# isort: split
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.kid import KernelInceptionDistance

from vavae.metrics.generation import kernel_distance


def features(count: int, shift: float = 0.0, seed: int = 0, dimensions: int = 6) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed)) + shift


def kernel(x: Tensor, y: Tensor) -> float:
    return (x @ y / len(x) + 1).item() ** 3


def test_two_features_each_by_hand():
    (a, b), (c, d) = features(2).double(), features(2, 1.0, seed=1).double()
    expected = kernel(a, b) + kernel(c, d) - (kernel(a, c) + kernel(a, d) + kernel(b, c) + kernel(b, d)) / 2
    found = kernel_distance(torch.stack([a, b]), torch.stack([c, d]), seed=0, subsets=1)
    assert found.mean == pytest.approx(expected, rel=1e-12)
    assert found.std == 0
    assert found.subset == 2


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_of_whole_sets_it_is_that_of_torchmetrics_and_torch_fidelity(shift: float):
    a, b = features(40), features(40, shift, seed=1)
    theirs = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=40)
    theirs.update(a, real=False)
    theirs.update(b, real=True)
    also = kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=40, verbose=False)
    ours = kernel_distance(a, b, seed=3, subsets=1).mean
    assert ours == pytest.approx(theirs.compute()[0].item(), rel=1e-4, abs=1e-5)
    assert ours == pytest.approx(also["kernel_inception_distance_mean"], rel=1e-4, abs=1e-5)
    assert ours == pytest.approx(kernel_distance(b, a, seed=4, subsets=1).mean, rel=1e-10), "the sides are equal"


def test_subsets_average_to_the_whole_and_hang_on_the_seed_alone():
    a, b = features(300), features(250, 0.5, seed=1)
    whole = kernel_distance(a[:250], b, seed=0, subsets=1).mean
    found = kernel_distance(a, b, seed=0, subset_features=100)
    assert abs(found.mean - whole) < 3 * found.std / 10 + 0.1 * whole
    assert found.subset == 100
    state = torch.get_rng_state()
    assert kernel_distance(a, b, seed=0, subset_features=100) == found
    assert kernel_distance(a, b, seed=1, subset_features=100).mean != found.mean
    assert torch.equal(torch.get_rng_state(), state)


def test_sets_of_one_distribution_are_at_no_distance_but_for_chance():
    found = kernel_distance(features(400), features(400, seed=1), seed=0, subset_features=200)
    far = kernel_distance(features(400), features(400, 1.0, seed=1), seed=0, subset_features=200)
    assert abs(found.mean) < 0.02 * far.mean


def test_one_feature_has_no_distance():
    with pytest.raises(AssertionError, match="no kernel distance"):
        kernel_distance(features(1), features(5), seed=0)
