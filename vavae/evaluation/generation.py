"""How good generated images are, measured against real ones."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vavae.data.shard_reader import LabeledImages
from vavae.metrics.agreement import class_agreement, within_class_variety
from vavae.metrics.frechet import Moments, frechet_distance
from vavae.metrics.inception_score import inception_score
from vavae.metrics.kernel_distance import KernelDistance, kernel_distance
from vavae.metrics.manifold import NEIGHBOR, PrecisionRecall, precision_recall
from vavae.metrics.reference import ReferenceFile
from vavae.metrics.summary import FeatureSummary, Summaries
from vavae.sampling.sample_shards import read_samples
from vavae.storage.storage import Storage


class Reference(NamedTuple):
    """What generated images are compared with, through one extractor."""

    pooled: Moments
    spatial: Moments | None
    kept: Tensor
    """Features of some of its images, float32 [K, D]; none where only moments are known."""
    images: int | None
    """Behind the moments; none where a file does not say."""
    name: str
    """In words, with the number."""

    @classmethod
    def of(cls, summary: FeatureSummary, images: str) -> "Reference":
        """A set of images, called so."""
        count = summary.pooled.count
        return cls(summary.pooled, summary.spatial, summary.kept, count, f"{count:,} {images}")

    @classmethod
    def of_file(cls, file: ReferenceFile, images: FeatureSummary | None, name: str) -> "Reference":
        """A file, and its images where it has any."""
        kept = torch.empty(0, len(file.pooled.mean)) if images is None else images.kept
        return cls(file.pooled, file.spatial, kept, None, name)


class Generation(NamedTuple):
    """Measures of generated images through one extractor; none where it, or the reference, lacks what they take."""

    images: int
    frechet_distance: float
    spatial_frechet_distance: float | None
    inception_score: float | None
    kernel_distance: KernelDistance | None
    precision_recall: PrecisionRecall | None


def measure_generation(
    generated: FeatureSummary, reference: Reference, seed: int, device: torch.device | str = "cpu"
) -> Generation:
    """Compare generated images with a reference.

    Args:
        generated: all their features are kept.
        reference: through the same extractor.
        seed: of the subsets that the kernel distance draws.
        device: where the measures over pairs of features are made.
    """
    features, real = generated.kept.to(device), reference.kept.to(device)
    fewest = min(len(features), len(real))
    spatial = None
    if generated.spatial is not None and reference.spatial is not None:
        spatial = frechet_distance(generated.spatial, reference.spatial)
    return Generation(
        generated.pooled.count,
        frechet_distance(generated.pooled, reference.pooled),
        spatial,
        inception_score(generated.splits) if generated.splits else None,
        kernel_distance(features, real, seed=seed) if fewest > 1 else None,
        precision_recall(features, real) if fewest > NEIGHBOR else None,
    )


def further_distances(
    generated: Summaries, references: Mapping[str, Reference], extractors: Sequence[str]
) -> dict[str, float]:
    """Fréchet distances through other extractors, by their names."""
    return {name: frechet_distance(generated[name].pooled, references[name].pooled) for name in extractors}


def sample_batches(
    samples: Storage, files: Sequence[str], shard_images: int, span: range, batch_size: int
) -> Iterator[Tensor]:
    """Generated images [B, 3, H, W] in uint8 whose indices are in the span; a batch ends with its shard.

    Args:
        samples: their folder.
        files: names of all shards.
        shard_images: in every shard but the last.
        span: indices.
        batch_size: B.
    """
    for number in range(span.start // shard_images, -(-span.stop // shard_images)):
        first = number * shard_images
        for shard in read_samples(samples, [sorted(files)[number]]):
            yield from shard.images[max(0, span.start - first) : span.stop - first].split(batch_size)


class ClassifierVerdict(NamedTuple):
    """What a classifier of real training images makes of the generated ones."""

    class_agreement: float
    """Share of generated images that it puts into the class asked for."""
    ceiling: float
    """Share of held-out real images that it classifies right."""
    within_class_variety: float
    """Mean pixel distance within a class, generated over real."""


def judge(generated: LabeledImages, train: LabeledImages, held_out: LabeledImages, seed: int) -> ClassifierVerdict:
    """Class agreement and variety of generated images, next to those of real ones."""
    real = (train.images, train.labels)
    return ClassifierVerdict(
        class_agreement(generated.images, generated.labels, *real, seed=seed),
        class_agreement(held_out.images, held_out.labels, *real, seed=seed),
        within_class_variety(generated.images, generated.labels, *real, seed=seed),
    )
