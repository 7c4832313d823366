"""Precision and recall: sets made for a known answer, and torch-fidelity's on the same features."""

import pytest
import torch
from torch import Tensor

import vavae.torchvision_compat  # noqa: F401  (before torch-fidelity)

# isort: split
from torch_fidelity.metric_prc import calculate_precision_recall_full

from vavae.metrics import generation
from vavae.metrics.generation import PrecisionRecall, precision_recall


def features(count: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def test_a_set_covers_itself():
    assert precision_recall(features(20), features(20)) == PrecisionRecall(1, 1)


def test_sets_far_apart_cover_nothing():
    assert precision_recall(features(20), features(30) + 100) == PrecisionRecall(0, 0)


def test_a_generator_that_knows_one_of_two_clusters_is_precise_and_forgetful():
    cluster = features(20, 0.1)
    found = precision_recall(cluster, torch.cat([cluster, cluster + 50]))
    assert found == PrecisionRecall(1, 0.5)


def test_on_a_line_by_hand():
    real = torch.tensor([0.0, 1, 2, 3, 10]).view(-1, 1)  # third neighbors at 3, 2, 2, 3 and 8
    generated = torch.tensor([-3.0, -3.5, 17.5, 5.5]).view(-1, 1)  # at 9, 9.5, 21 and 12
    assert precision_recall(generated, real) == PrecisionRecall(precision=0.75, recall=1)


@pytest.mark.parametrize("rows", [7, 1_000])
def test_agrees_with_torch_fidelity_whatever_the_number_of_rows_at_a_time(monkeypatch, rows: int):
    monkeypatch.setattr(generation, "_ROWS", rows)
    generated, real = features(80, 0.8), features(60, seed=1)
    precision, recall = calculate_precision_recall_full(generated, real)
    found = precision_recall(generated, real)
    assert found == pytest.approx((precision, recall), abs=1e-6)
    assert 0 < found.recall < found.precision < 1
    order = torch.randperm(80, generator=torch.Generator().manual_seed(2))
    assert precision_recall(generated[order], real.flip(0)) == pytest.approx(found, abs=1e-12)


def test_too_few_features_have_no_third_neighbor():
    with pytest.raises(AssertionError, match="no neighbor"):
        precision_recall(features(3), features(5))
