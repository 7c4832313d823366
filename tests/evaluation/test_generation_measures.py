"""Generated images against a reference: what is measured where, and what cannot be."""

import pytest
import torch
from PIL import Image
from support import image_shards
from torch import Tensor

from vavae.data.image import encode_image
from vavae.data.shards.tar import write_tar
from vavae.evaluation.generation import Reference, evaluate_generation, further_distances, sample_batches
from vavae.metrics.features import FeatureSummary
from vavae.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance
from vavae.metrics.inception_score import ClassSums
from vavae.metrics.reference import ReferenceFile
from vavae.storage.storage import Storage


def features(count: int = 30, shift: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)) + shift


def summary(drawn: Tensor, everything: bool = True) -> FeatureSummary:
    pooled, spatial, classes = FeatureStatistics.empty(4), FeatureStatistics.empty(2), ClassSums.empty(4)
    pooled.update(drawn)
    spatial.update(drawn[:, :2])
    classes.update(drawn)
    return FeatureSummary(pooled, spatial if everything else None, (classes,) if everything else (), drawn)


def test_a_set_against_itself():
    found = evaluate_generation(summary(features()), Reference.of(summary(features()), "held-out images"), seed=0)
    assert found.images == 30
    assert found.frechet_distance == pytest.approx(0, abs=1e-9)
    assert found.spatial_frechet_distance == pytest.approx(0, abs=1e-9)
    assert found.precision_recall == (1, 1)
    assert found.kernel_distance is not None
    assert found.kernel_distance.mean < 0, "without bias it is below zero where both sides are the same"
    assert found.inception_score is not None
    assert found.inception_score > 1


def test_permutations_of_both_sets_change_nothing_but_the_draws_of_the_kernel_distance():
    generated, real = features(40, 0.3), features(30, seed=1)
    first = evaluate_generation(summary(generated), Reference.of(summary(real), ""), seed=0)
    shuffled = generated[torch.randperm(40, generator=torch.Generator().manual_seed(2))]
    second = evaluate_generation(summary(shuffled), Reference.of(summary(real.flip(0)), ""), seed=0)
    assert second[:4] == pytest.approx(first[:4], rel=1e-9)
    assert second.precision_recall == pytest.approx(first.precision_recall, rel=1e-9)
    assert first.kernel_distance is not None
    assert second.kernel_distance is not None
    # Of the smaller set all are drawn each time.
    assert second.kernel_distance.mean == pytest.approx(first.kernel_distance.mean, rel=0.2)


def test_an_extractor_without_classes_and_positions_leaves_their_measures_out():
    found = evaluate_generation(summary(features(), everything=False), Reference.of(summary(features()), ""), seed=0)
    assert found.spatial_frechet_distance is None
    assert found.inception_score is None


def test_a_file_of_moments_alone_leaves_the_measures_over_pairs_out():
    real = summary(features(seed=1))
    moments = Gaussian(real.pooled.mean, real.pooled.covariance)
    reference = Reference.of_file(ReferenceFile(moments, None, 0), None, "some.npz")
    found = evaluate_generation(summary(features()), reference, seed=0)
    assert found.frechet_distance == frechet_distance(summary(features()).pooled, real.pooled)
    assert found.kernel_distance is None
    assert found.precision_recall is None
    assert found.spatial_frechet_distance is None
    assert reference.name == "some.npz"
    assert reference.images is None


def test_further_extractors_have_their_own_references():
    generated = {"inception": summary(features()), "dinov2_small": summary(features(shift=1.0))}
    references = {name: Reference.of(each, "") for name, each in generated.items()}
    references["dinov2_small"] = Reference.of(summary(features()), "")
    found = further_distances(generated, references, ["dinov2_small"])
    assert found == {"dinov2_small": pytest.approx(4, rel=1e-6)}  # moved by 1 in each of 4 dimensions


def test_samples_are_read_by_their_index_whatever_their_shards(tmp_path):
    pixels = [image_shards.image("samples", index) for index in range(11)]
    files = [f"{number:06d}.tar" for number in range(3)]
    for number, name in enumerate(files):
        with write_tar(tmp_path / name) as tar:
            for index in range(4 * number, min(4 * number + 4, 11)):
                tar.add(index, {"png": encode_image(Image.fromarray(pixels[index]), "png").data, "cls": b"0"})
    storage = Storage(str(tmp_path))
    for span in (range(11), range(0, 4), range(3, 9), range(8, 11)):
        batches = list(sample_batches(storage, files[::-1], 4, span, 3))
        expected = torch.stack([torch.from_numpy(pixels[index]) for index in span])
        assert torch.equal(torch.cat(batches).permute(0, 2, 3, 1), expected)
        assert max(map(len, batches)) <= 3
