"""Class agreement and within-class variety of class-conditional images, for small images."""

import torch
from torch import Tensor

from vavae.errors import UserError
from vavae.randomness import torch_generator


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


def within_class_variety(
    generated: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor, *, seed: int, max_per_class: int = 200
) -> float:
    """Mean pixel distance between images of one class, generated over real, averaged over classes.

    The value 1 is as various as the real images, 0 is one image per class. Arguments as in :func:`class_agreement`;
    classes without two differing real images and two generated ones are left out.

    Raises:
        UserError: no class is left.
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
    if not ratios:
        raise UserError("within-class variety needs a class with two generated and two differing real images")
    return sum(ratios) / len(ratios)


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
