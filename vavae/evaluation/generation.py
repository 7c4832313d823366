"""How good generated images are, measured against held-out and training images."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from vavae.data.passes import LabelledImages
from vavae.metrics.agreement import class_agreement, within_class_variety
from vavae.metrics.features import FeatureExtractor
from vavae.metrics.frechet import FeatureStatistics, frechet_distance


class Judgement(NamedTuple):
    """What a classifier of real training images makes of the generated ones."""

    class_agreement: float
    """Share of generated images that it puts into the class asked for."""
    ceiling: float
    """Share of held-out real images that it classifies right."""
    within_class_variety: float
    """Mean pixel distance within a class, generated over real."""


def measure_distance(
    samples: Iterable[LabelledImages],
    reference: FeatureStatistics,
    extractor: FeatureExtractor,
    batch_size: int,
    advance: Callable[[int], None],
) -> tuple[int, float]:
    """Number of generated images and their Fréchet distance to the reference."""
    features = FeatureStatistics.empty(extractor.num_features)
    for shard in samples:
        for images in shard.images.split(batch_size):
            features.update(extractor(images))
            advance(len(images))
    return features.count, frechet_distance(features, reference)


def judge(generated: LabelledImages, train: LabelledImages, held_out: LabelledImages, seed: int) -> Judgement:
    """Class agreement and variety of generated images, next to those of real ones."""
    real = (train.images, train.labels)
    return Judgement(
        class_agreement(generated.images, generated.labels, *real, seed=seed),
        class_agreement(held_out.images, held_out.labels, *real, seed=seed),
        within_class_variety(generated.images, generated.labels, *real, seed=seed),
    )
