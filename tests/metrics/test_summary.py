"""Summaries of sets: what they hold, and that neither batches nor parts nor who did them change it."""

from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vavae.metrics.features import Description, FeatureExtractor, Features, FeatureSummary, join, summarize
from vavae.metrics.frechet import frechet_distance
from vavae.metrics.inception_score import inception_score


class Projections(FeatureExtractor):
    """Fixed random projections of the pixels, with or without the further features of Inception."""

    def __init__(self, everything: bool, dimensions: int = 6) -> None:
        super().__init__(Description("inception", dimensions, "projections"))
        weight = torch.randn(3 * 4 * 4, dimensions + 9, generator=torch.Generator().manual_seed(7))
        self.register_buffer("weight", weight)
        self.everything = everything

    def features(self, images: Tensor) -> Features:
        pooled, spatial, logits = (images.flatten(1).float() / 255 @ self.weight).split((self.num_features, 4, 5), 1)
        return Features(pooled, spatial, logits) if self.everything else Features(pooled)


EXTRACTORS = {"inception": Projections(everything=True), "dinov2_small": Projections(everything=False, dimensions=3)}


def images(count: int = 40) -> Tensor:
    return torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def tensors_of(summaries: Mapping[str, FeatureSummary]) -> dict[str, Tensor]:
    return {f"{name}/{key}": t for name, summary in summaries.items() for key, t in summary.tensors().items()}


@given(batch_size=st.integers(1, 50), cuts=st.sets(st.integers(1, 39), max_size=4))
@settings(deadline=None, max_examples=40)
def test_batches_and_parts_add_up_to_the_whole(batch_size: int, cuts: set[int]):
    bounds = [0, *sorted(cuts), 40]
    whole = summarize([images()], EXTRACTORS, keep=12)
    parts = [
        summarize(images()[start:stop].split(batch_size), EXTRACTORS, keep=12 - start)
        for start, stop in pairwise(bounds)
    ]
    joined = join(iter(parts))
    for name, summary in joined.items():
        assert summary.pooled.count == 40
        torch.testing.assert_close(summary.kept, whole[name].kept, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(summary.pooled.covariance, whole[name].pooled.covariance, rtol=1e-5, atol=1e-6)
        # To rounding of the features, not of the sums.
        assert frechet_distance(summary.pooled, whole[name].pooled) < 1e-8
    assert len(joined["inception"].splits) == len(parts)
    assert joined["inception"].spatial is not None
    assert joined["dinov2_small"].spatial is None


def test_parts_give_the_same_bits_whoever_made_them():
    def part(number: int) -> dict[str, FeatureSummary]:
        return summarize(images()[10 * number : 10 * number + 10].split(4), EXTRACTORS, keep=100)

    in_order = join(part(number) for number in range(4))
    elsewhere = {number: part(number) for number in (3, 1, 0, 2)}
    other = join(elsewhere[number] for number in range(4))
    expected, found = tensors_of(in_order), tensors_of(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_the_features_of_the_first_images_are_kept_in_their_order():
    seen = EXTRACTORS["inception"](images())
    for keep, expected in ((7, 7), (0, 0), (-3, 0), (99, 40)):
        kept = summarize(images().split(5), EXTRACTORS, keep)["inception"].kept
        assert kept.shape == (expected, 6)
        torch.testing.assert_close(kept, seen[:expected])


def test_a_set_of_one_part_is_that_part():
    part = summarize(images().split(9), EXTRACTORS, keep=5)
    assert join([part]) == part


def test_tensors_and_back():
    for summary in summarize(images().split(9), EXTRACTORS, keep=5).values():
        restored = FeatureSummary.from_tensors(summary.tensors())
        assert tensors_of({"x": restored}).keys() == tensors_of({"x": summary}).keys()
        assert torch.equal(restored.pooled.covariance, summary.pooled.covariance)
        assert torch.equal(restored.kept, summary.kept)
        if summary.splits:
            assert inception_score(restored.splits) == inception_score(summary.splits)


def test_progress_is_told():
    done: list[int] = []
    summarize(images().split(15), EXTRACTORS, 0, advance=done.append)
    assert done == [15, 15, 10]


@pytest.mark.parametrize("extractor", EXTRACTORS.values())
def test_an_extractor_is_what_torchmetrics_takes(extractor: FeatureExtractor):
    assert extractor(images(2)).shape == (2, extractor.num_features)


def test_nothing_is_rounded_to_tf32_while_it_is_measured() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before, allowed = (matmul.allow_tf32, cudnn.allow_tf32), []

    class Extractor(Projections):
        def features(self, images: Tensor) -> Features:
            allowed.append((matmul.allow_tf32, cudnn.allow_tf32))
            return super().features(images)

    matmul.allow_tf32 = cudnn.allow_tf32 = True
    summarize([images()], {"inception": Extractor(everything=False)}, keep=0)
    assert (matmul.allow_tf32, cudnn.allow_tf32) == (True, True)
    matmul.allow_tf32, cudnn.allow_tf32 = before
    assert allowed == [(False, False)]
