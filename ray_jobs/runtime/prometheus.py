"""Metrics of a run among Ray's own, where Prometheus scrapes them."""

import time
from collections.abc import Mapping
from functools import cache

from ray.util.metrics import Counter, Gauge

from vavae.finite import finite_row
from vavae.training.logging.metric_names import metric_info, metric_name

TAGS = ("run", "stage", "rank")
_REFRESH_SECONDS = 5.0


class Exporter:
    """Exports metrics as `ray_vavae_…`, by the names of `metric_name`; what adds up becomes a counter.

    Args:
        run: name of the run.
        stage: name of the job.
        rank: of this process; `driver` for the driver.
    """

    def __init__(self, run: str, stage: str, rank: str) -> None:
        self._tags = dict(zip(TAGS, (run, stage, rank), strict=True))
        self._shown: dict[str, float] = {}
        self._refreshed = time.monotonic()

    def show(self, metrics: Mapping[str, float]) -> None:
        """Export the metrics of a row of the log, or of `JOB_METRICS`; one that is not finite has none until it is."""
        for name, value in finite_row(metrics).items():
            metric = _metric(name)
            if value is None:
                self._shown.pop(name, None)
            elif isinstance(metric, Gauge):
                self._shown[name] = value
                metric.set(value, self._tags)
            elif value > 0:  # Ray's counters take nothing else
                metric.inc(value, self._tags)

    def refresh(self) -> None:
        """Set all gauges again every few seconds: Ray drops one that was not set for two reports, or 20 s."""
        if time.monotonic() - self._refreshed >= _REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            self.show(self._shown)


@cache
def _metric(name: str) -> Gauge | Counter:
    """The metric of this process with a name; Ray allows one, whatever its tags."""
    found = metric_info(name)
    kind = Counter if found.adds_up else Gauge
    return kind(metric_name(name), found.meaning, TAGS)
