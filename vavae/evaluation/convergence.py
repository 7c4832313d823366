"""Images and epochs until measured checkpoints of a training reach a Fréchet distance (EP_FD@K)."""

from collections.abc import Mapping
from typing import Any

from vavae.evaluation.metric import Metric
from vavae.metrics.convergence import first_crossing

DISTANCE = "generation_frechet_distance"
"""The metric of measured checkpoints that is looked at."""


def convergence_names(threshold: float) -> tuple[str, str]:
    """Names of the metrics of the images, and of the epochs, until a threshold."""
    return f"images_to_frechet/{threshold:g}", f"epochs_to_frechet/{threshold:g}"


def convergence_metrics(
    found: Mapping[int, Mapping[str, Mapping[str, Any]]], thresholds: tuple[float, ...], train_images: int
) -> list[Metric]:
    """Images and epochs until each Fréchet distance; none of one that is not reached, see `not_reached`.

    Args:
        found: metrics of the measured checkpoints by images seen, as they are stored.
        thresholds: the distances.
        train_images: images of an epoch.
    """
    rows = _rows(found)
    metrics = []
    for threshold in thresholds:
        crossing = first_crossing({seen: row["value"] for seen, row in rows.items()}, threshold)
        if crossing is None:
            continue
        protocol = f"{rows[crossing.until]['protocol']}; until {threshold:g}, {crossing.in_words}"
        epochs = f"{protocol}; epochs of {train_images:,} images"
        of_images, of_epochs = convergence_names(threshold)
        metrics.append(Metric(of_images, crossing.images, "images", protocol, "lower"))
        metrics.append(Metric(of_epochs, crossing.images / train_images, "epochs", epochs, "lower"))
    return metrics


def not_reached(found: Mapping[int, Mapping[str, Mapping[str, Any]]], thresholds: tuple[float, ...]) -> dict[str, str]:
    """Words on each threshold that no measured checkpoint reached, by the name of its metric."""
    distances = {seen: row["value"] for seen, row in _rows(found).items()}
    words = "not measured yet"
    if distances:
        best = min(distances, key=distances.__getitem__)
        words = f"not reached in {max(distances):,} images; lowest {distances[best]:.4g} after {best:,}"
    return {
        convergence_names(threshold)[0]: words
        for threshold in thresholds
        if first_crossing(distances, threshold) is None
    }


def _rows(found: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[int, Mapping[str, Any]]:
    """Value and protocol of the distance by images seen; without checkpoints that were skipped."""
    return {seen: metrics[DISTANCE] for seen, metrics in found.items() if DISTANCE in metrics}
