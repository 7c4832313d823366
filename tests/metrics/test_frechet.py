import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vavae.torchvision_compat  # noqa: F401  (before torchmetrics)

# isort: split
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from vavae.errors import UserError
from vavae.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance


def gaussian(mean: Tensor, covariance: Tensor, count: int = 1000) -> FeatureStatistics:
    """The statistics of a set of features with exactly this mean and covariance."""
    mean, covariance = mean.double(), covariance.double()
    return FeatureStatistics(count, count * mean, (count - 1) * covariance + count * torch.outer(mean, mean))


def statistics_of(features: Tensor, batch_size: int = 1_000_000) -> FeatureStatistics:
    statistics = FeatureStatistics.empty(features.shape[1])
    for batch in features.split(batch_size):
        statistics.update(batch)
    return statistics


def features(count: int, dimensions: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator)
    return torch.randn(count, dimensions, generator=generator) @ mixing + 3


def test_diagonal_gaussians():
    a = gaussian(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 4.0, 9.0]).diag())
    b = gaussian(torch.tensor([0.0, 1.0, 0.5]), torch.tensor([16.0, 1.0, 9.0]).diag())
    # |Δμ|² = 1 + 9 + 0 and Σ(√a - √b)² = 9 + 1 + 0
    assert frechet_distance(a, b) == pytest.approx(20, abs=1e-10)


@given(variances=st.tuples(*[st.floats(0.01, 10)] * 4), angle=st.floats(0, math.pi), shift=st.floats(-5, 5))
@settings(deadline=None)
def test_rotated_gaussians_in_the_plane(variances: tuple[float, ...], angle: float, shift: float):
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    first = torch.tensor(variances[:2], dtype=torch.float64).diag()
    second = turn @ torch.tensor(variances[2:], dtype=torch.float64).diag() @ turn.T
    # For 2 x 2: tr √M = √(tr M + 2 √det M)
    cross = math.sqrt((first @ second).trace().item() + 2 * math.sqrt(math.prod(variances)))
    expected = shift**2 + sum(variances) - 2 * cross
    moved = torch.tensor([0.0, shift], dtype=torch.float64)
    found = frechet_distance(gaussian(torch.zeros(2), first), gaussian(moved, second))
    assert found == pytest.approx(expected, abs=1e-10)


def test_singular_covariances():
    a, b = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, 2.0, 1.0])
    zero = torch.zeros(3)
    # Along one direction each: tr(aaᵀ + bbᵀ) - 2 |a·b|
    found = frechet_distance(gaussian(zero, torch.outer(a, a)), gaussian(zero, torch.outer(b, b)))
    assert found == pytest.approx(25 + 5 - 2 * 8, abs=1e-6)


@pytest.mark.parametrize("count", [8, 200])
def test_a_set_has_no_distance_to_itself_in_any_order(count: int):
    drawn = features(count, 32)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    scale = drawn.var(0).sum().item()
    assert frechet_distance(statistics_of(drawn), statistics_of(drawn[order])) <= 1e-9 * scale


def test_order_of_the_two_sets_does_not_matter():
    a, b = statistics_of(features(100, 16, seed=1)), statistics_of(features(120, 16, seed=2))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


@given(batch_size=st.integers(1, 60), cut=st.integers(0, 50))
@settings(deadline=None, max_examples=30)
def test_batches_and_workers_add_up_to_the_whole(batch_size: int, cut: int):
    drawn = features(50, 6)
    whole = statistics_of(drawn)
    parts = statistics_of(drawn[:cut], batch_size).merge(statistics_of(drawn[cut:], batch_size))
    assert parts.count == 50
    torch.testing.assert_close(parts.mean, drawn.double().mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(parts.covariance, torch.cov(drawn.double().T), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(parts.outer, whole.outer, rtol=1e-13, atol=0)


def test_merging_leaves_both_parts_alone():
    a, b = statistics_of(features(5, 3)), statistics_of(features(7, 3))
    before = {name: value.clone() for name, value in a.tensors().items()}
    a.merge(b).update(features(2, 3))
    assert all(torch.equal(before[name], value) for name, value in a.tensors().items())


def test_tensors_and_back():
    statistics = statistics_of(features(9, 4))
    restored = FeatureStatistics.from_tensors(statistics.tensors())
    assert restored.count == 9
    assert torch.equal(restored.mean, statistics.mean)
    assert torch.equal(restored.covariance, statistics.covariance)


@pytest.mark.parametrize(("count", "singular"), [(4, True), (5, False)])
def test_too_few_features_are_told(count: int, singular: bool):
    statistics = statistics_of(features(count, 4))
    assert statistics.is_singular is singular
    assert (torch.linalg.matrix_rank(statistics.covariance) < 4) == singular


class Projection(nn.Module):
    """A small extractor: fixed random projections of the pixels."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(3 * 8 * 8, 12, generator=torch.Generator().manual_seed(7)))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() @ self.weight / 255


def test_agrees_with_torchmetrics():
    generator = torch.Generator().manual_seed(3)
    real = torch.randint(0, 256, (80, 3, 8, 8), generator=generator, dtype=torch.uint8)
    fake = torch.randint(0, 200, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    extractor = Projection()
    theirs = FrechetInceptionDistance(feature=extractor)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = frechet_distance(statistics_of(extractor(real)), statistics_of(extractor(fake)))
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-6)


@pytest.mark.parametrize("counts", [(200, 150), (20, 30)])
def test_agrees_with_torch_fidelity(counts: tuple[int, int]):
    drawn = [features(count, 24, seed=count) for count in counts]
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, drawn), verbose=False)
    ours = frechet_distance(*map(statistics_of, drawn))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_moments_that_others_computed_serve_as_well():
    a, b = statistics_of(features(100, 16, seed=1)), statistics_of(features(120, 16, seed=2))
    assert frechet_distance(a, Gaussian(b.mean, b.covariance)) == frechet_distance(a, b)


@pytest.mark.parametrize("spoiled", ["mean", "covariance"])
@pytest.mark.parametrize("place", [0, 1])
def test_moments_that_are_not_finite_have_no_distance(spoiled: str, place: int):
    moments = [{"mean": torch.zeros(4).double(), "covariance": torch.eye(4).double()} for _ in range(2)]
    moments[place][spoiled][3] = torch.nan
    with pytest.raises(UserError, match=rf"moments of features: {spoiled}\[3.*\] is nan.*no Fréchet distance"):
        frechet_distance(*(Gaussian(**each) for each in moments))


def test_features_of_two_extractors_have_no_distance():
    with pytest.raises(AssertionError, match="5 and 4 dimensions"):
        frechet_distance(statistics_of(features(9, 5)), statistics_of(features(9, 4)))
