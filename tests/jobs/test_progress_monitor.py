"""The driver's monitor while workers are silent, busy and done: lines, metrics and events."""

import threading
from types import SimpleNamespace

import pytest

from ray_jobs.runtime import progress_monitor
from ray_jobs.runtime.progress_actor import ProgressUpdate
from ray_jobs.runtime.progress_monitor import ProgressMonitor, log_job_events, monitor_progress, redirect_progress
from vavae.errors import UserError
from vavae.progress import Progress, display
from vavae.runs.events import Event, EventLog, read_events


class Scripted:
    """A progress actor that answers as written, and ends the job with its last answer but one."""

    def __init__(self, answers, ended):
        self._answers, self._ended = list(answers), ended

    def read(self):
        answer = self._answers.pop(0)
        if len(self._answers) == 1:
            self._ended.set()
        return answer


class Remembering:
    """An exporter that remembers the last metrics."""

    def __init__(self):
        self.metrics, self.running, self.refreshed = {}, [], 0

    def show(self, metrics):
        self.metrics |= metrics
        self.running += [metrics["stage_running"]] if "stage_running" in metrics else []

    def refresh(self):
        self.refreshed += 1


@pytest.fixture
def exporter():
    return Remembering()


@pytest.fixture
def lines_of(capsys, monkeypatch, storage, exporter):
    def lines_of(answers, total=None):
        monkeypatch.setattr(progress_monitor, "_POLL_SECONDS", 0.01)
        ended = threading.Event()
        actor = Scripted([ProgressUpdate(*answer) for answer in [*answers, (None, 0, [])]], ended)
        with display("sample") as show:
            ProgressMonitor("sample", actor, total, show, exporter, EventLog(storage)).poll_until(ended)
        return capsys.readouterr().out.splitlines()

    return lines_of


def test_a_line_comes_even_when_nothing_is_reported(lines_of, exporter):
    lines = lines_of([(None, 0, [])] * 3, 8)
    assert [line.split()[:2] for line in lines] == [["sample", "starting"]] * 3
    assert (exporter.metrics["images"], exporter.running) == (0, [1, 0])
    assert exporter.refreshed == 4, "at every poll"


def test_advances_of_pooled_tasks_add_up_to_progress(lines_of, exporter):
    first, second, third = lines_of([(None, 2, []), (None, 4, []), (None, 4, [])], 8)
    assert first.split() == ["sample", "2/8", "images"]
    assert "images/s" in second
    assert "left" in third
    assert exporter.metrics == {"images": 4, "images_planned": 8, "stage_running": 0}


def test_a_finished_job_says_that_it_is_finishing(lines_of):
    done = Progress("train_vavae", 8, 8)
    first, second = lines_of([(done, 0, [])] * 2)
    assert first == done.line()
    assert second.split()[:2] == ["sample", "finishing"]


def test_trainings_are_shown_by_their_own_progress(lines_of, exporter):
    assert lines_of([(Progress("train_vavae", 4, 8, rate=2.0), 0, [])]) == [
        "train_vavae        4/8 images  2 images/s  0:02 left"
    ]
    assert (exporter.metrics["images"], exporter.metrics["images_planned"]) == (4, 8)


def test_events_of_workers_are_written_down(lines_of, storage):
    events = [Event("checkpoint", "train_vavae", images) for images in (8, 16, 24)]
    lines_of([(None, 0, events[:2]), (None, 0, []), (None, 0, events[2:])])
    assert [event["images"] for event in read_events(storage)] == [8, 16, 24]
    assert len(storage.list("events")) == 2, "a segment for each poll that found something"


def test_redirected_progress_arrives_as_records_and_is_not_printed(monkeypatch, storage, exporter, capsys):
    monkeypatch.setattr(progress_monitor, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(progress_monitor, "Exporter", lambda *names: exporter)
    progress, received, arrived = Progress("sample", 4, 8), [], threading.Event()
    actor = SimpleNamespace(read=lambda: ProgressUpdate(progress, 0, []))
    job = SimpleNamespace(config=SimpleNamespace(name="run"), storage=storage)

    def receive(moment):
        received.append(moment)
        arrived.set()

    with redirect_progress(receive), monitor_progress(job, "sample", actor):
        assert arrived.wait(60)
    assert set(map(Progress.line, received)) == {progress.line()}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (UserError("lower it"), "failed", "lower it"),
        (ValueError("first\nsecond"), "failed", "ValueError: first"),
        (KeyboardInterrupt(), "stop", None),
    ],
)
def test_begin_and_end_of_a_job_are_events(storage, error, kind, text):
    with pytest.raises(type(error)), log_job_events(EventLog(storage), "sample"):
        raise error
    with log_job_events(EventLog(storage), "sample"):
        pass
    begun, ended, again, done = read_events(storage)
    assert (begun["event"], again["event"], done["event"]) == ("stage_begun", "stage_begun", "stage_done")
    assert (ended["event"], ended["stage"], ended.get("error")) == (kind, "sample", text)
    assert done["seconds"] >= 0
