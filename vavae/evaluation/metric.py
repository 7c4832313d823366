"""A metric with all that is needed to compare it with another, and its form in `metrics.json`."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from vavae.errors import UserError
from vavae.runs.files import METRICS
from vavae.storage.storage import Storage


@dataclass(frozen=True)
class Metric:
    """A number and all that is needed to compare it with another: results are made of these alone.

    Args:
        name: name of the metric.
        value: the number.
        unit: unit such as "dB"; empty for plain numbers.
        protocol: extractor, number of images, guidance and the like.
        better: direction of better values.
        spread: standard deviation of the value, where it is a mean over several draws.

    Raises:
        UserError: the value or the spread is not finite.
    """

    name: str
    value: float
    unit: str = ""
    protocol: str = ""
    better: Literal["higher", "lower"] = "lower"
    spread: float | None = None

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.value, self.spread or 0.0))):
            spread = "" if self.spread is None else f" ± {self.spread:g}"
            raise UserError(
                f"{self.name} is {self.value:g}{spread}, which is no result ({self.protocol}): look at the images and "
                "models that it is of, and evaluate them again"
            )


def read_metrics(folder: Storage) -> list[Metric]:
    """Read the metrics in the folder of a run; none before it is evaluated."""
    if not folder.is_file(METRICS):
        return []
    return [Metric(name, **fields) for name, fields in folder.read_json(METRICS).items()]


def metrics_json(metrics: list[Metric]) -> dict[str, dict[str, Any]]:
    """Fields of metrics by name, as `read_metrics` reads them."""
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
