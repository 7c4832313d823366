"""Metrics of generated images against real ones."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from vavae.data.config import RGB, PixelFormat
from vavae.data.shard_reader import LabeledImages, labeled_batches, shard_records
from vavae.errors import UserError
from vavae.metrics.config import MindConfig
from vavae.metrics.features import FeatureSummary, Summaries
from vavae.metrics.frechet import Moments, frechet_distance
from vavae.metrics.generation import (
    NEIGHBOR,
    KernelDistance,
    LinearProbe,
    PrecisionRecall,
    class_agreement,
    kernel_distance,
    precision_recall,
    within_class_variety,
)
from vavae.metrics.inception_score import inception_score
from vavae.metrics.mind import Mind, mind
from vavae.metrics.reference import ReferenceFile
from vavae.storage.storage import Storage


class Reference(NamedTuple):
    """Features of the images that generated ones are compared with, through one extractor."""

    pooled: Moments
    """Moments of the pooled features."""
    spatial: Moments | None
    """Moments of the spatial features, where the extractor has them."""
    kept: Tensor
    """Pooled features of some of the images, float32 [K, D]; K = 0 where only moments are known."""
    images: int | None
    """Number of images behind the moments; None where a file does not say."""
    name: str
    """The reference in words, with the number of images."""

    @classmethod
    def of(cls, summary: FeatureSummary, images: str) -> "Reference":
        """Make a reference of a set of images.

        Args:
            summary: features of the images.
            images: what they are, such as "held-out images".
        """
        count = summary.pooled.count
        return cls(summary.pooled, summary.spatial, summary.kept, count, f"{count:,} {images}")

    @classmethod
    def of_file(cls, file: ReferenceFile, images: FeatureSummary | None, name: str) -> "Reference":
        """Make a reference of the moments in a file.

        Args:
            file: the file, with moments.
            images: features of the images in the file, where it has any.
            name: name of the file.
        """
        assert file.pooled is not None, "a file without moments is a set of images"
        kept = torch.empty(0, len(file.pooled.mean)) if images is None else images.kept
        return cls(file.pooled, file.spatial, kept, None, name)


class Divisor(NamedTuple):
    """Fréchet distance of real images, in units of which that of generated ones is stated."""

    distance: float
    words: str
    """Origin of the distance."""


class Generation(NamedTuple):
    """Metrics of generated images through one extractor; None where it, or the reference, lacks what they need."""

    images: int
    """Number of generated images."""
    frechet_distance: float
    spatial_frechet_distance: float | None
    inception_score: float | None
    kernel_distance: KernelDistance | None
    precision_recall: PrecisionRecall | None
    mind: Mind | None
    """Also None where it is not asked for."""


def evaluate_generation(
    generated: FeatureSummary,
    reference: Reference,
    seed: int,
    device: torch.device | str = "cpu",
    mind_config: MindConfig | None = None,
) -> Generation:
    """Compare generated images with a reference.

    Args:
        generated: features of the generated images, all kept.
        reference: the reference through the same extractor.
        seed: seed of the subsets that the kernel distance draws, and of the directions of MIND.
        device: where metrics over pairs of features are computed.
        mind_config: settings of MIND; None leaves it out.

    Raises:
        UserError: the spatial moments of the reference are of another length.
    """
    features, real = generated.kept.to(device), reference.kept.to(device)
    fewest = min(len(features), len(real))
    spatial = None
    if generated.spatial is not None and reference.spatial is not None:
        lengths = [len(moments.mean) for moments in (reference.spatial, generated.spatial)]
        if lengths[0] != lengths[1]:
            raise UserError(
                f"{reference.name}: mu_s is [{lengths[0]}], expected [{lengths[1]}]: it was made with another network"
            )
        spatial = frechet_distance(generated.spatial, reference.spatial)
    return Generation(
        generated.pooled.count,
        frechet_distance(generated.pooled, reference.pooled),
        spatial,
        inception_score(generated.splits) if generated.splits else None,
        kernel_distance(features, real, seed=seed) if fewest > 1 else None,
        precision_recall(features, real) if fewest > NEIGHBOR else None,
        mind(features, real, mind_config, seed=seed) if mind_config is not None and fewest > 1 else None,
    )


def further_distances(
    generated: Summaries, references: Mapping[str, Reference], extractors: Sequence[str]
) -> dict[str, float]:
    """Fréchet distances through other extractors by their names."""
    return {name: frechet_distance(generated[name].pooled, references[name].pooled) for name in extractors}


def sample_batches(
    samples: Storage,
    files: Sequence[str],
    shard_images: int,
    span: range,
    batch_size: int,
    threads: int = 1,
    form: PixelFormat = RGB,
) -> Iterator[Tensor]:
    """Read the samples of a span in batches uint8 or uint16 [B, C, H, W]; a batch ends with its shard.

    Args:
        samples: folder of the samples.
        files: names of all shards.
        shard_images: images in every shard but the last.
        span: indices of the samples.
        batch_size: B, at most.
        threads: threads that decode; their number changes nothing.
        form: channels and depth of the images.
    """
    for number in range(span.start // shard_images, -(-span.stop // shard_images)):
        first = number * shard_images
        records = shard_records(samples.local_file(sorted(files)[number]))
        chosen = islice(records, max(0, span.start - first), span.stop - first)
        for batch in labeled_batches(chosen, batch_size, threads, form):
            yield batch.images


class LabeledFeatures(NamedTuple):
    """Features of images through one extractor, and their classes."""

    features: Tensor
    """float32 [N, D]."""
    labels: Tensor
    """int64 [N]."""


class ClassifierVerdict(NamedTuple):
    """Metrics of generated images by a classifier of real training images."""

    class_agreement: float
    """Share of generated images that it puts into the class asked for, 0 to 1."""
    ceiling: float
    """Share of held-out real images that it classifies right, 0 to 1."""
    within_class_variety: float | None
    """Mean pixel distance within a class, generated over real; None where no class has two images of both."""
    fitted: int
    """Number of training images that the classifier was fitted to."""
    held_out: int
    """Number of held-out images that it was tried on."""


def classify_generated(
    generated: LabeledImages,
    train: LabeledImages,
    held_out: LabeledImages,
    seed: int,
    features: tuple[LabeledFeatures, LabeledFeatures, LabeledFeatures] | None = None,
) -> ClassifierVerdict:
    """Compute class agreement and variety of generated images, next to those of real ones.

    Args:
        generated: generated images and the classes asked for.
        train: images that the classifier is fitted to.
        held_out: images that give the ceiling.
        seed: seed of the classifier.
        features: those of the same three sets, for a linear probe; None classifies pixels.
    """
    real = (train.images, train.labels)
    if features is None:
        agreement, ceiling = (class_agreement(*each, *real, seed=seed) for each in (generated, held_out))
        fitted, tried = len(train.labels), len(held_out.labels)
    else:
        generated_features, train_features, held_out_features = features
        probe = LinearProbe(*train_features)
        agreement, ceiling = probe.agreement(*generated_features), probe.agreement(*held_out_features)
        fitted, tried = len(train_features.labels), len(held_out_features.labels)
    variety = within_class_variety(generated.images, generated.labels, *real, seed=seed)
    return ClassifierVerdict(agreement, ceiling, variety, fitted, tried)
