"""Detection of trainings that collapse while all numbers stay finite, from the rows of their log."""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vavae.errors import CommonError

GRADIENT_NORM = "gradient_norm/"
OUTPUT_VARIANCE = "output_variance"
DISCRIMINATOR_ACCURACY = "discriminator_accuracy"
"""Metrics that show a collapse: all that begin with the first, and the other two."""

LEAST_GRADIENT = 1e-3
"""Share of its running median below which a gradient norm has collapsed."""
LEAST_VARIANCE = 1e-4
"""Share of the variance of the data below which that of the outputs has collapsed."""
MOST_ACCURACY = 0.99
"""Accuracy above which a discriminator has won."""
WARNING_ROWS = 20
"""Rows in a row after which there is a warning, if the training does not stop sooner."""
UNJUDGED_ROWS = 10
"""First rows of a metric, which are not judged, for a median needs some and a discriminator is new."""
_MEDIAN_ROWS = 100
"""Rows over which the running median is taken."""
PATIENT_ROWS = _MEDIAN_ROWS
"""The same of outputs that have never varied: a LightningDiT's begin at zero, and grow with the learning rate."""
HISTORY_ROWS = UNJUDGED_ROWS + _MEDIAN_ROWS
"""Rows before a collapse that a new detector needs to go where another one was."""


class CollapseError(CommonError):
    """A training that has collapsed for as many rows as it may."""


class Collapse(NamedTuple):
    """A collapse that lasts."""

    metric: str
    figure: str
    """The metric's last value and the limit that it has crossed, for users."""
    since_images: int
    """Images seen at the end of the first of these rows."""
    rows: int

    def __str__(self) -> str:
        return f"{self.metric} is {self.figure}, for {self.rows} rows of the log, from {self.since_images:,} images on"

    def remedy(self, job: str) -> str:
        """Settings of a training that prevent it, for users."""
        if self.metric == DISCRIMINATOR_ACCURACY or self.metric.endswith("discriminator"):
            return (
                f"lower losses.adversarial.weight or {job}.discriminator_optimizer.learning_rate, or raise "
                "losses.adversarial.start_images, under another name"
            )
        return f"lower {job}.optimizer.learning_rate under another name"


@dataclass
class _MetricHistory:
    """Rows of one metric up to now."""

    normal: deque[float] = field(default_factory=lambda: deque(maxlen=_MEDIAN_ROWS))
    """Last values of rows that are no part of a collapse."""
    collapsed_rows: int = 0
    """Rows in a row that are one, up to the last."""
    since_images: int = 0
    """Images seen at the end of the first of these."""

    def is_judged(self, name: str) -> bool:
        """Return whether enough rows are known for the next one to be judged."""
        has_varied = name != OUTPUT_VARIANCE or max(self.normal, default=0.0) >= LEAST_VARIANCE
        return len(self.normal) >= (UNJUDGED_ROWS if has_varied else PATIENT_ROWS)


class CollapseDetector:
    """Comparison of every row of a training's log, which is a mean over steps, with limits and with the rows before.

    All that it knows follows from the rows: it comes to the same result on every rank, and after a resume.

    Args:
        after_images: images seen up to which no row counts, while the learning rate still rises.
    """

    def __init__(self, after_images: int) -> None:
        self._after_images = after_images
        self._histories: dict[str, _MetricHistory] = {}

    def add(self, images_seen: int, row: Mapping[str, Any]) -> list[Collapse]:
        """Add a row; returns every collapse of which it is one.

        Args:
            images_seen: at the end of the row.
            row: metrics by name; one that is missing or not finite, where all steps were skipped, stays as it was.
        """
        if images_seen <= self._after_images:
            return []
        judged = [
            self._judge(name, value, images_seen)
            for name, value in row.items()
            if (name.startswith(GRADIENT_NORM) or name in (OUTPUT_VARIANCE, DISCRIMINATOR_ACCURACY))
            and math.isfinite(value)
        ]
        return [collapse for collapse in judged if collapse is not None]

    def _judge(self, name: str, value: float, images_seen: int) -> Collapse | None:
        """Judge the next value of a metric; returns the collapse of which it is one."""
        history = self._histories.setdefault(name, _MetricHistory())
        figure = _figure_of_collapse(name, value, history.normal) if history.is_judged(name) else None
        if figure is None:
            history.normal.append(value)
            history.collapsed_rows = 0
            return None
        if history.collapsed_rows == 0:
            history.since_images = images_seen
        history.collapsed_rows += 1
        return Collapse(name, figure, history.since_images, history.collapsed_rows)


def _figure_of_collapse(name: str, value: float, before: deque[float]) -> str | None:
    """Return a value with the limit that it has crossed; None where it has crossed none."""
    if name == OUTPUT_VARIANCE:
        return f"{value:.2g} of the data's, below {LEAST_VARIANCE:g}" if value < LEAST_VARIANCE else None
    if name == DISCRIMINATOR_ACCURACY:
        return f"{value:.2%}, above {MOST_ACCURACY:.0%}" if value > MOST_ACCURACY else None
    median = statistics.median(before)
    is_below = value < LEAST_GRADIENT * median
    return f"{value:.2g}, below {LEAST_GRADIENT:g} of its running median {median:.2g}" if is_below else None
