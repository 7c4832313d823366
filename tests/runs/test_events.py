"""Events of a run, in immutable segments."""

import json

import pytest
from support.toy_training import train_toy

from vavae.runs.events import EVENTS, Event, EventLog, read_events
from vavae.storage.storage import Storage
from vavae.training.session import LocalSession


def test_a_line_has_what_is_known(storage: Storage) -> None:
    event = Event("skipped_step", "train_vavae", 0, {"figures": "loss nan"}, "2026-01-02T03:04:05.678901+00:00")
    assert json.loads(event.line()) == {
        "time": "2026-01-02T03:04:05.678901+00:00",
        "event": "skipped_step",
        "stage": "train_vavae",
        "images": 0,
        "figures": "loss nan",
    }
    assert list(json.loads(Event("started").line())) == ["time", "event"]


def test_a_figure_that_is_not_finite_is_null() -> None:
    assert json.loads(Event("measured", details={"a": float("nan"), "b": 1.0}).line()) | {"time": ""} == {
        "time": "",
        "event": "measured",
        "a": None,
        "b": 1.0,
    }


def test_segments_stay_and_events_come_in_their_order(storage: Storage) -> None:
    first, second, third = (Event("checkpoint", "toy", images) for images in (8, 16, 24))
    EventLog(storage).add(third)
    before = {path: storage.read_bytes(path) for path in storage.list(EVENTS)}
    EventLog(storage).add(first, second)
    EventLog(storage).add()
    assert [event["images"] for event in read_events(storage)] == [8, 16, 24]
    assert len(storage.list(EVENTS)) == 2
    assert {path: storage.read_bytes(path) for path in before} == before
    assert storage.list(EVENTS)[0] not in before, "segments are named by their first event"


def test_a_failing_store_gets_events_later(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("full")

    log = EventLog(storage)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_bytes", refuse)
        log.add(Event("started"))
    assert "1 events are not written yet: full" in caplog.text
    assert read_events(storage) == []
    log.add(Event("done"))
    assert [event["event"] for event in read_events(storage)] == ["started", "done"]


def test_a_training_on_its_own_leaves_its_events(storage: Storage) -> None:
    train_toy(storage, session=LocalSession(EventLog(storage)), images=16, checkpoint_images=8)
    assert [(event["event"], event["stage"], event["images"]) for event in read_events(storage)] == [
        ("checkpoint", "toy", 8),
        ("checkpoint", "toy", 16),
    ]
