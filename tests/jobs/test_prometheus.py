"""Gauges and counters of a job, with Ray's own replaced by a list of calls."""

import pytest

from ray_jobs.runtime import prometheus
from ray_jobs.runtime.prometheus import Exporter

TAGS = {"run": "a", "stage": "s", "rank": "0"}


@pytest.fixture
def calls(monkeypatch):
    """The calls of Ray's metrics, in order."""
    calls = []

    class Fake:
        def __init__(self, name, meaning, tag_keys):
            assert meaning
            assert tag_keys == prometheus.TAGS
            self._name = name

    class FakeGauge(Fake):
        def set(self, value, tags):
            calls.append((self._name, "set", value, tags))

    class FakeCounter(Fake):
        def inc(self, value, tags):
            assert value > 0, "as Ray's"
            calls.append((self._name, "inc", value, tags))

    monkeypatch.setattr(prometheus, "Gauge", FakeGauge)
    monkeypatch.setattr(prometheus, "Counter", FakeCounter)
    prometheus._metric.cache_clear()
    yield calls
    prometheus._metric.cache_clear()


def test_what_adds_up_is_a_counter_and_all_else_a_gauge(calls):
    Exporter("a", "s", "0").show({"loss/total": 0.0, "skipped_steps": 2, "storage/retries": 0})
    assert calls == [("vavae_loss_total", "set", 0.0, TAGS), ("vavae_skipped_steps", "inc", 2, TAGS)]


def test_a_figure_that_is_not_finite_has_no_gauge_until_it_is(calls, monkeypatch):
    exporter = Exporter("a", "s", "0")
    exporter.show({"loss/total": 1.0, "data_wait": 0.5})
    exporter.show({"loss/total": float("nan"), "skipped_steps": float("inf")})
    monkeypatch.setattr(prometheus.time, "monotonic", lambda: exporter._refreshed + 5)
    exporter.refresh()
    assert calls[2:] == [("vavae_data_wait", "set", 0.5, TAGS)]


def test_gauges_are_shown_again_and_counters_are_not(calls, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(prometheus.time, "monotonic", lambda: now[0])
    exporter = Exporter("a", "s", "0")
    exporter.show({"loss/total": 1.0, "skipped_steps": 2})
    exporter.show({"loss/total": 0.5, "data_wait": 0.1})
    calls.clear()
    exporter.refresh()
    assert calls == [], "not yet"
    for _ in range(2):
        now[0] += 5
        exporter.refresh()
        exporter.refresh()
    assert calls == [("vavae_loss_total", "set", 0.5, TAGS), ("vavae_data_wait", "set", 0.1, TAGS)] * 2
