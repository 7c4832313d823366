"""Figures of a run among Ray's own metrics, where Prometheus finds them."""

import time
from collections.abc import Mapping
from functools import cache

from ray.util.metrics import Counter, Gauge

from vavae.training.logging.metric_names import metric_info, metric_name

TAGS = ("run", "stage", "rank")
_REFRESH_SECONDS = 5.0


class Exporter:
    """Shows figures under the names of `metric_name`, as `ray_vavae_…`; what adds up becomes a counter.

    Args:
        run: name of the run.
        stage: name of the job.
        rank: of this process, or what else it is.
    """

    def __init__(self, run: str, stage: str, rank: str) -> None:
        self._tags = dict(zip(TAGS, (run, stage, rank), strict=True))
        self._shown: dict[str, float] = {}
        self._refreshed = time.monotonic()

    def show(self, figures: Mapping[str, float]) -> None:
        """Show the figures of a row, or others of `METRICS`."""
        for name, value in figures.items():
            metric = _metric(name)
            if isinstance(metric, Gauge):
                self._shown[name] = value
                metric.set(value, self._tags)
            elif value > 0:  # Ray's counters take nothing else
                metric.inc(value, self._tags)

    def refresh(self) -> None:
        """Show the last figures again, if it is time: Ray drops a gauge that was not set for two reports, or 20 s."""
        if time.monotonic() - self._refreshed >= _REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            self.show(self._shown)


@cache
def _metric(name: str) -> Gauge | Counter:
    """One for the whole process, whatever its tags."""
    found = metric_info(name)
    kind = Counter if found.adds_up else Gauge
    return kind(metric_name(name), found.meaning, TAGS)
