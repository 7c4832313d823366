"""The driver's monitor while workers are silent, busy and done: lines, metrics and events."""

import threading
from types import SimpleNamespace

import pytest

from ray_jobs.runtime import progress_monitor
from ray_jobs.runtime.progress_actor import ProgressUpdate, SpacedSum
from ray_jobs.runtime.progress_monitor import ProgressMonitor, log_job_events, monitor_progress, redirect_progress
from vavae.errors import UserError
from vavae.progress import Progress
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
def moments_of(monkeypatch, storage, exporter):
    def moments_of(answers, total=None):
        monkeypatch.setattr(progress_monitor, "_POLL_SECONDS", 0.01)
        ended, moments = threading.Event(), []
        actor = Scripted([ProgressUpdate(*answer) for answer in [*answers, (None, 0, [])]], ended)
        ProgressMonitor("sample", actor, total, moments.append, exporter, EventLog(storage)).poll_until(ended)
        return moments

    return moments_of


def test_a_job_starts_until_something_is_reported(moments_of, exporter):
    assert moments_of([(None, 0, [])] * 3, 8) == ["starting"] * 3
    assert (exporter.metrics["images"], exporter.running) == (0, [1, 0])
    assert exporter.refreshed == 4, "at every poll"


def test_advances_of_pooled_tasks_add_up_to_progress(moments_of, exporter):
    first, second, third = moments_of([(None, 2, []), (None, 4, []), (None, 4, [])], 8)
    assert first == Progress("sample", 2, 8)
    assert second.rate > 0
    assert "left" in third.line()
    assert exporter.metrics == {"images": 4, "images_planned": 8, "stage_running": 0}


def test_what_comes_after_the_images_is_shown_and_counts_no_images(moments_of, exporter):
    doing = Progress("sample", 1, 3, "maps", doing="mapping latents")
    assert moments_of([(None, 8, []), (doing, 8, [])], 8) == [Progress("sample", 8, 8), doing]
    assert (exporter.metrics["images"], exporter.metrics["images_planned"]) == (8, 8)


def test_trainings_are_shown_by_their_own_progress(moments_of, exporter):
    progress = Progress("train_vavae", 4, 8, rate=2.0)
    assert moments_of([(progress, 0, [])]) == [progress]
    assert (exporter.metrics["images"], exporter.metrics["images_planned"]) == (4, 8)


def test_events_of_workers_are_written_down(moments_of, storage):
    events = [Event("checkpoint", "train_vavae", images) for images in (8, 16, 24)]
    moments_of([(None, 0, events[:2]), (None, 0, []), (None, 0, events[2:])])
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


def test_images_are_reported_together_and_none_is_lost() -> None:
    sent: list[int] = []
    spaced = SpacedSum(sent.append, seconds=3600)
    threads = [threading.Thread(target=lambda: [spaced.add(1) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sent == [1], "the first at once, the others later"
    spaced.flush()
    spaced.flush()
    assert sent == [1, 1999]
    eager = SpacedSum(sent.append, seconds=0)
    eager.add(2)
    eager.add(3)
    assert sent == [1, 1999, 2, 3]
