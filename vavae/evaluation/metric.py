"""One metric with all that is needed to compare it with another, and its form in `metrics.json`."""

from dataclasses import dataclass
from typing import Any, Literal

from vavae.runs.files import METRICS
from vavae.storage.storage import Storage


@dataclass(frozen=True)
class Metric:
    """A figure and all that is needed to compare it with another.

    Args:
        name: what was measured.
        value: the figure.
        unit: such as "dB"; empty for plain numbers.
        protocol: extractor, number of images, guidance and the like.
        better: which way is better.
        spread: standard deviation of the figure, where it is a mean over several draws.
    """

    name: str
    value: float
    unit: str = ""
    protocol: str = ""
    better: Literal["higher", "lower"] = "lower"
    spread: float | None = None


def read_metrics(folder: Storage) -> list[Metric]:
    """Metrics in the folder of a run, as `evaluate` left them; none before it has."""
    if not folder.is_file(METRICS):
        return []
    return [Metric(name, **figure) for name, figure in folder.read_json(METRICS).items()]


def metrics_json(metrics: list[Metric]) -> dict[str, dict[str, Any]]:
    """Figures as plain values, by name; what `read_metrics` reads."""
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
