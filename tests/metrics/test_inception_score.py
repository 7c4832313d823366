"""The Inception score: closed forms, sums of parts, and torch-fidelity's on the same logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vavae.torchvision_compat  # noqa: F401  (before torch-fidelity)

# isort: split
from torch_fidelity.metric_isc import isc_features_to_metric

from vavae.metrics.inception_score import ClassSums, inception_score


def sums_of(logits: Tensor, batch_size: int = 1_000) -> ClassSums:
    sums = ClassSums.empty(logits.shape[1])
    for batch in logits.split(batch_size):
        sums.update(batch)
    return sums


def logits(count: int = 60, classes: int = 9, seed: int = 0) -> Tensor:
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def test_certain_images_of_every_class_score_the_number_of_classes():
    assert sums_of(1_000 * torch.eye(7)).score() == pytest.approx(7, rel=1e-12)


def test_images_that_all_look_alike_score_one():
    assert sums_of(logits(1).expand(30, -1)).score() == pytest.approx(1, rel=1e-12)
    assert sums_of(torch.zeros(5, 4)).score() == pytest.approx(1, rel=1e-12)


@given(batch_size=st.integers(1, 70), cut=st.integers(1, 59), order=st.permutations(range(60)))
@settings(deadline=None, max_examples=30)
def test_neither_batches_nor_order_matter(batch_size: int, cut: int, order: list[int]):
    drawn = logits()
    whole, shuffled = sums_of(drawn), sums_of(drawn[order], batch_size)
    assert shuffled.score() == pytest.approx(whole.score(), rel=1e-12)
    torch.testing.assert_close(shuffled.total, whole.total, rtol=1e-12, atol=0)
    assert 1 <= sums_of(drawn[:cut], batch_size).score() <= drawn.shape[1]


@pytest.mark.parametrize("splits", [1, 3])
def test_agrees_with_torch_fidelity(splits: int):
    drawn = logits()
    theirs = isc_features_to_metric(drawn, splits=splits, shuffle=False)["inception_score_mean"]
    ours = inception_score([sums_of(part) for part in drawn.split(60 // splits)])
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_tensors_and_back():
    sums = sums_of(logits())
    restored = ClassSums.from_tensors(sums.tensors())
    assert restored.count == sums.count
    assert restored.score() == sums.score()
