"""Trackers in threads: what they get, once each, and that none of them delays or ends a training."""

import logging
import sys
import threading
from types import ModuleType

import pytest
from support.toy_training import train_toy

from vavae.errors import UserError
from vavae.report.html import Report, render
from vavae.storage.storage import Storage
from vavae.tracking.background_tracker import BackgroundTracker
from vavae.tracking.tracker import TrackedJob
from vavae.tracking.trackers import check_trackers, links, open_trackers, track

LIMIT = 20.0


class Stand:
    """A tracker's client that keeps what it is given."""

    link, last_step = "https://tracker.test/run", -1

    def __init__(self) -> None:
        self.steps, self.rows, self.pictures, self.failed = [], {}, [], None

    def metrics(self, step, row):
        self.steps.append(step)
        self.rows.setdefault(step, {}).update(row)

    def picture(self, step, name, picture):
        self.pictures.append((step, name))

    def finish(self, failed):
        self.failed = failed


class Broken(Stand):
    def metrics(self, step, row):
        super().metrics(step, row)
        raise ConnectionError("network down")


def no_login():
    sys.exit("no key")


@pytest.mark.parametrize(("open_run", "why"), [(Broken, "network down"), (no_login, "no key")])
def test_a_failing_tracker_does_not_end_a_training(storage: Storage, caplog, open_run, why):
    tracker = BackgroundTracker("broken", open_run)
    with caplog.at_level(logging.WARNING):
        assert train_toy(storage, trackers=[tracker], images=16, log_images=4).images_seen == 16
        tracker.close(failed=False)
    (warning,) = [record.message for record in caplog.records if "tracking" in record.message]
    assert "broken" in warning
    assert why in warning


def test_a_hanging_tracker_delays_neither_steps_nor_the_end(storage: Storage, caplog):
    release = threading.Event()
    tracker = BackgroundTracker("slow", lambda: release.wait(LIMIT) and Stand(), close_seconds=0.1)
    with caplog.at_level(logging.WARNING):
        train_toy(storage, trackers=[tracker], images=16, log_images=4)
        tracker.close(failed=False)
    assert not release.is_set()
    release.set()
    assert "not everything was sent within 0.1 seconds" in caplog.text


def test_rows_that_a_tracker_has_are_not_shown_again(storage: Storage):
    run = Stand()
    tracker = BackgroundTracker("stand", lambda: run)
    train_toy(storage, trackers=[tracker], images=16, log_images=4)
    storage.delete("checkpoints/000000000016")
    train_toy(storage, trackers=[tracker], images=24, log_images=4)
    tracker.close(failed=False)
    assert run.steps == [4, 8, 12, 16, 20, 24]
    assert run.rows[24]["loss/total"] > 0
    assert run.failed is False
    run, again = Stand(), Storage(storage.url("again"))
    run.last_step = 8  # what an attempt that was killed has logged
    tracker = BackgroundTracker("stand", lambda: run)
    train_toy(again, trackers=[tracker], images=16, log_images=4)
    tracker.close(failed=False)
    assert run.steps == [12, 16]


def fail_in(job):
    with open_trackers(["wandb"], job) as (tracker,):
        tracker.rewind(0)
        raise UserError


def test_another_attempt_continues_under_the_same_identity(storage: Storage, monkeypatch):
    opened = []

    class Run(Stand):
        def __init__(self, job, identity):
            super().__init__()
            opened.append((job.name, identity, self))

    module = ModuleType("vavae.tracking.wandb_tracker")
    module.WandbRun = Run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    folders = [storage.child(name) for name in ("records", "tensorboard")]
    for resumes in (True, True, False):
        job = TrackedJob("toy", "evaluate", {}, storage, *folders, resumes)
        track(["wandb"], job, 8, {"psnr": 2.0, "bad": float("nan")})
    names, identities, runs = zip(*opened, strict=True)
    assert {*names} == {"toy evaluate"}
    assert identities[0] == identities[1] != identities[2]
    assert [run.rows for run in runs] == [{8: {"psnr": 2.0}}] * 3
    assert links(folders[0]) == {"wandb": Stand.link}
    assert f'<a href="{Stand.link}"' in render(Report("toy", facts={"evaluation in wandb": Stand.link}))
    with pytest.raises(UserError):
        fail_in(job)
    assert opened[-1][2].failed


def test_a_missing_package_is_one_line_with_its_extra(monkeypatch):
    check_trackers(["tensorboard"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^tracking: trackio is not installed: pip install -e '\.\[trackio\]'$"):
        check_trackers(["trackio"])
