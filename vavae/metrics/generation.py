"""Metrics of generated images beside the Fréchet distance: kernel distance, precision and recall, class agreement.

The kernel distance on features of Inception is KID (Bińkowski et al. 2018). Precision and recall are the improved ones
(Kynkäänniemi et al. 2019): which features lie in the other set's neighborhoods. Variety within a class, and class
agreement unless by a linear probe of features, look at pixels, so they are for small images.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import vavae.torchvision_compat  # noqa: F401  (before torchmetrics)

# isort: split
from torchmetrics.image.kid import poly_mmd

from vavae.errors import UserError
from vavae.randomness import torch_generator

SUBSETS, SUBSET_FEATURES = 100, 1_000
"""Published number of subsets, and of features drawn from both sets for each, without replacement."""


class KernelDistance(NamedTuple):
    """Squared maximum mean discrepancy under the kernel (x·y / D + 1)³, without bias, so it may fall below 0."""

    mean: float
    std: float
    """Standard deviation over the subsets."""
    subset: int
    """Number of features in one subset."""


def kernel_distance(
    a: Tensor, b: Tensor, *, seed: int, subsets: int = SUBSETS, subset_features: int = SUBSET_FEATURES
) -> KernelDistance:
    """Kernel distance of features [N, D] and [M, D], in float64; of smaller sets than a subset all are taken.

    Args:
        a: features of one set, [N, D].
        b: features of the other set, [M, D].
        seed: with the number of the subset it keys which features are drawn; their order in a set counts.
        subsets: number of subsets.
        subset_features: number of features in each.
    """
    size = min(subset_features, len(a), len(b))
    assert size > 1, f"no kernel distance of {len(a)} and {len(b)} features"
    distances = torch.stack([_subset_distance(a, b, size, seed, number) for number in range(subsets)])
    return KernelDistance(distances.mean().item(), distances.std(correction=0).item(), size)


def _subset_distance(a: Tensor, b: Tensor, size: int, seed: int, number: int) -> Tensor:
    rng = torch_generator(seed, "kernel distance", number)
    first, second = (features[torch.randperm(len(features), generator=rng)[:size]] for features in (a, b))
    return poly_mmd(first.double(), second.double())


NEIGHBOR = 3
"""Rank of the neighbor that a feature's ball reaches to (as published and in ADM's evaluation)."""
_ROWS = 1_024


class PrecisionRecall(NamedTuple):
    """Precision and recall, shares in [0, 1]."""

    precision: float
    """Share of generated features inside a ball of a real one: how good they look."""
    recall: float
    """Share of real features inside a ball of a generated one: how much of the real set is covered."""


def precision_recall(generated: Tensor, real: Tensor) -> PrecisionRecall:
    """Precision and recall of features [N, D] and [M, D], more than three each; exact, in memory linear in N + M."""
    return PrecisionRecall(_covered(generated, real), _covered(real, generated))


def _covered(queries: Tensor, centers: Tensor) -> float:
    """Share of the queries that lie in the ball of any center."""
    assert len(centers) > NEIGHBOR, f"{len(centers)} features have no neighbor number {NEIGHBOR}"
    # A feature is the nearest to itself.
    radii = [rows.topk(NEIGHBOR + 1, largest=False).values[:, -1] for rows in _distances(centers, centers)]
    reach = torch.cat(radii)
    inside = [(rows <= reach).any(dim=1) for rows in _distances(queries, centers)]
    return torch.cat(inside).double().mean().item()


def _distances(queries: Tensor, centers: Tensor) -> Iterator[Tensor]:
    """Euclidean distances to all centers, some queries at a time."""
    return (torch.cdist(rows, centers) for rows in queries.split(_ROWS))


def class_agreement(
    generated: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor, *, seed: int, max_real: int = 4_000
) -> float:
    """Share in [0, 1] of generated images that a classifier of real images puts into the class asked for.

    The classifier is scikit-learn's support vector machine on pixels (RBF kernel of width "scale", C = 10). Given
    held-out real images as ``generated`` this is the classifier's accuracy, the ceiling to compare with.

    Args:
        generated: uint8 [N, C, H, W].
        labels: the classes asked for, int64 [N].
        real: uint8 [M, C, H, W], which the classifier is fitted on.
        real_labels: int64 [M].
        seed: keys which real images are taken if there are more than ``max_real``.
        max_real: cap on the fitting, which takes quadratic time.

    Raises:
        UserError: scikit-learn is not installed, or there are real images of one class only.
    """
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise UserError(
            "class agreement needs scikit-learn, which is not installed: pip install -e '.[quickstart]'"
        ) from error
    chosen = _subset(len(real), max_real, seed, "agreement")
    if len(real_labels[chosen].unique()) < 2:
        raise UserError(f"class agreement needs two classes or more, the {len(chosen)} real images have one")
    classifier = SVC(C=10, kernel="rbf", gamma="scale")
    classifier.fit(_pixels(real[chosen]).numpy(), real_labels[chosen].cpu().numpy())
    seen = classifier.predict(_pixels(generated).numpy())
    return float((seen == labels.cpu().numpy()).mean())


PROBE_STRENGTH = 0.01
"""Inverse strength C of the probe's regularization, for standardized features."""


class LinearProbe:
    """Multinomial logistic regression on standardized features of real images.

    Args:
        features: float [N, D].
        labels: int64 [N].

    Raises:
        UserError: scikit-learn is not installed, or there are real images of one class only.
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise UserError(
                "class agreement needs scikit-learn, which is not installed: pip install -e '.[quickstart]'"
            ) from error
        if len(labels.unique()) < 2:
            raise UserError(f"class agreement needs two classes or more, the {len(labels)} real images have one")
        self._classifier = make_pipeline(StandardScaler(), LogisticRegression(C=PROBE_STRENGTH, max_iter=1_000))
        self._classifier.fit(features.cpu().double().numpy(), labels.cpu().numpy())

    def agreement(self, features: Tensor, labels: Tensor) -> float:
        """Share in [0, 1] of images that it puts into the class asked for.

        Args:
            features: float [N, D].
            labels: the classes asked for, int64 [N].
        """
        seen = self._classifier.predict(features.cpu().double().numpy())
        return float((seen == labels.cpu().numpy()).mean())


def within_class_variety(
    generated: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor, *, seed: int, max_per_class: int = 200
) -> float | None:
    """Mean pixel distance between images of one class, generated over real, averaged over classes.

    The value 1 is as various as the real images, 0 is one image per class. Arguments as in :func:`class_agreement`;
    classes without two differing real images and two generated ones are left out; None where no class is left.
    """
    ratios = []
    for name in real_labels.unique().tolist():
        of_real, of_generated = real[real_labels == name], generated[labels == name]
        distances = [
            _mean_distance(images[_subset(len(images), max_per_class, seed, "variety", name)])
            for images in (of_generated, of_real)
        ]
        if len(of_generated) > 1 and distances[1] > 0:
            ratios.append(distances[0] / distances[1])
    return sum(ratios) / len(ratios) if ratios else None


def _mean_distance(images: Tensor) -> float:
    """Mean Euclidean distance over pairs; 0 for a single image."""
    distances = torch.pdist(_pixels(images))
    return distances.mean().item() if len(distances) else 0.0


def _pixels(images: Tensor) -> Tensor:
    return images.cpu().flatten(1).float() / 255


def _subset(count: int, limit: int, seed: int, *key: int | str) -> Tensor:
    """Indices of at most ``limit`` out of ``count``, ascending."""
    order = torch.randperm(count, generator=torch_generator(seed, *key))
    return order[:limit].sort().values
