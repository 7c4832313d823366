"""Events of a run, in immutable segments."""

import json
from pathlib import Path

import pytest
from support.toy import train_toy

from vavae.runs.events import EVENTS, Event, EventLog, read_events
from vavae.storage.storage import Storage
from vavae.training.session import LocalSession


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def test_a_line_has_what_is_known(run: Storage) -> None:
    event = Event("skipped_step", "train_vavae", 0, {"figures": "loss nan"}, "2026-01-02T03:04:05.678901+00:00")
    assert json.loads(event.line()) == {
        "time": "2026-01-02T03:04:05.678901+00:00",
        "event": "skipped_step",
        "stage": "train_vavae",
        "images": 0,
        "figures": "loss nan",
    }
    assert list(json.loads(Event("started").line())) == ["time", "event"]


def test_segments_stay_and_events_come_in_their_order(run: Storage) -> None:
    first, second, third = (Event("checkpoint", "toy", images) for images in (8, 16, 24))
    EventLog(run).add(third)
    before = {path: run.read_bytes(path) for path in run.list(EVENTS)}
    EventLog(run).add(first, second)
    EventLog(run).add()
    assert [event["images"] for event in read_events(run)] == [8, 16, 24]
    assert len(run.list(EVENTS)) == 2
    assert {path: run.read_bytes(path) for path in before} == before
    assert run.list(EVENTS)[0] not in before, "segments are named by their first event"


def test_a_failing_store_gets_events_later(
    run: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("full")

    log = EventLog(run)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_bytes", refuse)
        log.add(Event("started"))
    assert "1 events are not written yet: full" in caplog.text
    assert read_events(run) == []
    log.add(Event("done"))
    assert [event["event"] for event in read_events(run)] == ["started", "done"]


def test_a_training_on_its_own_leaves_its_events(run: Storage) -> None:
    train_toy(run, session=LocalSession(EventLog(run)), images=16, checkpoint_images=8)
    assert [(event["event"], event["stage"], event["images"]) for event in read_events(run)] == [
        ("checkpoint", "toy", 8),
        ("checkpoint", "toy", 16),
    ]
