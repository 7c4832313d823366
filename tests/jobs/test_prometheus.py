"""Gauges and counters of a job, with Ray's own replaced by lists of what they are told."""

import pytest

from ray_jobs.runtime import prometheus as _metrics
from ray_jobs.runtime.prometheus import Exporter

TAGS = {"run": "a", "stage": "s", "rank": "0"}


@pytest.fixture
def told(monkeypatch):
    """What Ray's metrics are told, in order."""
    calls = []

    class Fake:
        def __init__(self, name, meaning, tag_keys):
            assert meaning
            assert tag_keys == _metrics.TAGS
            self._name = name

    class FakeGauge(Fake):
        def set(self, value, tags):
            calls.append((self._name, "set", value, tags))

    class FakeCounter(Fake):
        def inc(self, value, tags):
            assert value > 0, "as Ray's"
            calls.append((self._name, "inc", value, tags))

    monkeypatch.setattr(_metrics, "Gauge", FakeGauge)
    monkeypatch.setattr(_metrics, "Counter", FakeCounter)
    _metrics._metric.cache_clear()
    yield calls
    _metrics._metric.cache_clear()


def test_what_adds_up_is_a_counter_and_all_else_a_gauge(told):
    Exporter("a", "s", "0").show({"loss/total": 0.0, "skipped_steps": 2, "storage/retries": 0})
    assert told == [("vavae_loss_total", "set", 0.0, TAGS), ("vavae_skipped_steps", "inc", 2, TAGS)]


def test_gauges_are_shown_again_and_counters_are_not(told, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(_metrics.time, "monotonic", lambda: now[0])
    exporter = Exporter("a", "s", "0")
    exporter.show({"loss/total": 1.0, "skipped_steps": 2})
    exporter.show({"loss/total": 0.5, "data_wait": 0.1})
    told.clear()
    exporter.refresh()
    assert told == [], "not yet"
    for _ in range(2):
        now[0] += 5
        exporter.refresh()
        exporter.refresh()
    assert told == [("vavae_loss_total", "set", 0.5, TAGS), ("vavae_data_wait", "set", 0.1, TAGS)] * 2
