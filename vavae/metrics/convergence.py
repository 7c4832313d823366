"""Number of images until a distance falls to a threshold, interpolated between measurements of a training."""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Crossing(NamedTuple):
    """The first fall of a distance to a threshold."""

    images: float
    """Images seen, interpolated linearly in images and in the logarithm of the distance."""
    after: int | None
    """Last measurement above the threshold; None where the first one is not, so that it may have been sooner."""
    until: int
    """First measurement that is not above it."""

    @property
    def in_words(self) -> str:
        """Origin of the number, for the protocol of a metric."""
        if self.after is None:
            return f"at most: reached at the first measurement, after {self.until:,} images"
        return (
            f"interpolated between measurements after {self.after:,} and {self.until:,} images, linearly in images and "
            "in the logarithm of the distance"
        )


def first_crossing(distances: Mapping[int, float], threshold: float) -> Crossing | None:
    """When a distance first falls to a threshold; None where no measurement is at or below it.

    Args:
        distances: distance, at least 0, by images seen.
        threshold: above 0.
    """
    before: int | None = None
    for images in sorted(distances):
        if distances[images] > threshold:
            before = images
        elif before is None or distances[images] == 0:
            return Crossing(float(images), before, images)
        else:
            fallen = math.log(distances[before] / threshold) / math.log(distances[before] / distances[images])
            return Crossing(before + (images - before) * fallen, before, images)
    return None
