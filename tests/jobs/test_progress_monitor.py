"""What the driver shows and writes down while workers are silent, busy and done."""

import threading

import pytest

from ray_jobs.runtime import progress_monitor as _watch
from ray_jobs.runtime.progress_actor import News
from ray_jobs.runtime.progress_monitor import Watch, told
from vavae.errors import UserError
from vavae.progress import Progress
from vavae.runs.events import Event, EventLog, read_events


class Scripted:
    """A board that answers as written, and ends the stage with its last answer but one."""

    def __init__(self, answers, ended):
        self._answers, self._ended = list(answers), ended

    def read(self):
        answer = self._answers.pop(0)
        if len(self._answers) == 1:
            self._ended.set()
        return answer


class Remembering:
    """An exporter that remembers the last figures."""

    def __init__(self):
        self.figures, self.running, self.refreshed = {}, [], 0

    def show(self, figures):
        self.figures |= figures
        self.running += [figures["stage_running"]] if "stage_running" in figures else []

    def refresh(self):
        self.refreshed += 1


@pytest.fixture
def exporter():
    return Remembering()


@pytest.fixture
def lines_of(capsys, monkeypatch, storage, exporter):
    def lines_of(answers, total=None):
        monkeypatch.setattr(_watch, "_MOMENT_SECONDS", 0.01)
        ended = threading.Event()
        board = Scripted([News(*answer) for answer in [*answers, (None, 0, [])]], ended)
        Watch("sample", board, total, exporter, EventLog(storage)).until(ended)
        return capsys.readouterr().out.splitlines()

    return lines_of


def test_a_line_comes_even_when_nothing_is_reported(lines_of, exporter):
    lines = lines_of([(None, 0, [])] * 3, 8)
    assert [line.split()[:2] for line in lines] == [["sample", "starting"]] * 3
    assert (exporter.figures["images"], exporter.running) == (0, [1, 0])
    assert exporter.refreshed == 4, "at every look"


def test_advances_of_pooled_tasks_add_up_to_progress(lines_of, exporter):
    first, second, third = lines_of([(None, 2, []), (None, 4, []), (None, 4, [])], 8)
    assert first.split() == ["sample", "2/8", "images"]
    assert "images/s" in second
    assert "left" in third
    assert exporter.figures == {"images": 4, "images_planned": 8, "stage_running": 0}


def test_a_finished_stage_says_that_it_is_finishing(lines_of):
    done = Progress("train_vavae", 8, 8)
    first, second = lines_of([(done, 0, [])] * 2)
    assert first == done.line()
    assert second.split()[:2] == ["sample", "finishing"]


def test_stages_are_shown_by_their_own_progress(lines_of, exporter):
    assert lines_of([(Progress("train_vavae", 4, 8, rate=2.0), 0, [])]) == [
        "train_vavae        4/8 images  2 images/s  0:02 left"
    ]
    assert (exporter.figures["images"], exporter.figures["images_planned"]) == (4, 8)


def test_events_of_workers_are_written_down(lines_of, storage):
    events = [Event("checkpoint", "train_vavae", images) for images in (8, 16, 24)]
    lines_of([(None, 0, events[:2]), (None, 0, []), (None, 0, events[2:])])
    assert [event["images"] for event in read_events(storage)] == [8, 16, 24]
    assert len(storage.list("events")) == 2, "a segment for each look that found something"


@pytest.mark.parametrize(
    ("error", "kind", "told_of_it"),
    [
        (UserError("lower it"), "failed", "lower it"),
        (ValueError("first\nsecond"), "failed", "ValueError: first"),
        (KeyboardInterrupt(), "stop", None),
    ],
)
def test_how_a_stage_ends_is_told(storage, error, kind, told_of_it):
    with pytest.raises(type(error)), told(EventLog(storage), "sample"):
        raise error
    with told(EventLog(storage), "sample"):
        pass
    begun, ended, again, done = read_events(storage)
    assert (begun["event"], again["event"], done["event"]) == ("stage_begun", "stage_begun", "stage_done")
    assert (ended["event"], ended["stage"], ended.get("error")) == (kind, "sample", told_of_it)
    assert done["seconds"] >= 0
