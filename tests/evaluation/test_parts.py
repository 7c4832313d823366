"""Parts of a set: cut alike for any number of actors, kept until they are joined."""

import pytest
import torch

from vavae.evaluation import parts
from vavae.evaluation.parts import PartFiles, concatenate, pack, spans, unpack
from vavae.metrics.features import FeatureSummary
from vavae.metrics.frechet import FeatureStatistics


@pytest.mark.parametrize(("count", "expected"), [(0, []), (3, [3]), (4, [4]), (9, [4, 4, 1])])
def test_spans_cover_a_set_once(monkeypatch, count, expected):
    monkeypatch.setattr(parts, "SPLIT_IMAGES", 4)
    found = spans("samples", count)
    assert [len(span) for span in found] == expected
    assert [index for span in found for index in span] == list(range(count))


def test_many_real_images_are_cut_into_few_parts_and_samples_into_splits():
    lengths = {of: [len(span) for span in spans(of, 1_281_167)] for of in ("train", "samples")}
    assert lengths["train"] == [25_000] * 51 + [6_167]
    assert lengths["samples"] == [5_000] * 256 + [1_167]
    assert spans("held_out", 50_000) == spans("samples", 50_000)


def test_what_is_missing_shrinks_until_the_whole_takes_the_place_of_the_parts(storage):
    all_spans = [range(0, 4), range(4, 8), range(8, 9)]
    files = PartFiles(storage, "references/digest", all_spans)
    assert files.missing() == all_spans
    for span in (all_spans[2], all_spans[0], all_spans[1]):  # in whatever order
        files.write(span, {"x": torch.arange(span.start, span.stop)})
    assert PartFiles(storage, "references/other", all_spans).missing() == all_spans
    assert files.missing() == []
    joins = []

    def join(found):
        joins.append(1)
        return concatenate(found)

    for _ in range(2):
        assert files.join(join)["x"].tolist() == list(range(9))
    assert joins == [1], "the whole is made once"
    assert storage.list("references", recursive=True) == ["references/digest.safetensors"]
    assert files.missing() == []


def test_summaries_are_told_from_the_measures_of_images():
    statistics = FeatureStatistics.empty(2)
    statistics.update(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    summary = FeatureSummary(statistics, None, (), torch.ones(1, 2))
    packed = pack({"inception": summary, "dinov2_small": summary}) | {"psnr": torch.zeros(2)}
    found = unpack(packed)
    assert found.keys() == {"inception", "dinov2_small"}
    assert torch.equal(found["inception"].pooled.covariance, statistics.covariance)
