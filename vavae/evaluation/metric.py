"""A metric with all that is needed to compare it with another, and its form in `metrics.json`."""

from dataclasses import dataclass
from typing import Any, Literal

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
