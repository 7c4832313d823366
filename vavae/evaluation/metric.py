"""A metric with all that is needed to compare it with another, and its form in `metrics.json`."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from vavae.errors import UserError
from vavae.runs.files import METRICS
from vavae.storage.storage import Storage


@dataclass(frozen=True)
class Metric:
    """A number and all that is needed to compare it with another.

    Args:
        name: name of the metric.
        value: the number.
        unit: unit such as "dB"; empty for plain numbers.
        protocol: extractor, number of images, guidance and the like.
        better: direction of better values.
        spread: standard deviation of the value, where it is a mean over several draws.
    """

    name: str
    value: float
    unit: str = ""
    protocol: str = ""
    better: Literal["higher", "lower"] = "lower"
    spread: float | None = None


def require_results(metrics: Iterable[Metric]) -> None:
    """Refuse metrics that are no results, before they are written anywhere.

    Raises:
        UserError: a value or a spread is not finite.
    """
    for metric in metrics:
        if not all(map(math.isfinite, (metric.value, metric.spread or 0.0))):
            spread = "" if metric.spread is None else f" ± {metric.spread:g}"
            raise UserError(
                f"{metric.name} is {metric.value:g}{spread}, which is no result ({metric.protocol}): look at the "
                "images and models that it is of, and evaluate them again"
            )


def read_metrics(folder: Storage) -> list[Metric]:
    """Read the metrics in the folder of a run; none before it is evaluated."""
    if not folder.is_file(METRICS):
        return []
    return [Metric(name, **fields) for name, fields in folder.read_json(METRICS).items()]


def metrics_json(metrics: list[Metric]) -> dict[str, dict[str, Any]]:
    """Fields of metrics by name, as `read_metrics` reads them.

    Raises:
        UserError: a metric is not finite.
    """
    require_results(metrics)
    return {
        metric.name: {
            "value": metric.value,
            "unit": metric.unit,
            "better": metric.better,
            "protocol": metric.protocol,
            **({} if metric.spread is None else {"spread": metric.spread}),
        }
        for metric in metrics
    }
