"""The real packages, offline: W&B into a folder, MLflow into SQLite, trackio into its own database."""

import sqlite3

import pytest
from PIL import Image
from support.waiting import wait_until

from vavae.storage.storage import Storage
from vavae.tracking.tracker import TrackedJob
from vavae.tracking.trackers import open_trackers, show_row

pytestmark = pytest.mark.integrations


@pytest.fixture
def job(tmp_path, monkeypatch):
    for name in ("WANDB_DIR", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = Storage(str(tmp_path / "toy"))
    config = {"seed": 1, "stream": {"lanes": 2, "none": None}}
    return TrackedJob("toy", "train_vavae", config, run, run.child("records"), run.child("tensorboard"))


def attempts(name, job):
    """Two attempts of which the second begins at a checkpoint before what the first one logged."""
    for begin, end in ((0, 16), (8, 24)):
        with open_trackers([name], job) as trackers:
            trackers[0].rewind(begin)
            for seen in range(begin + 4, end + 4, 4):
                if seen == 8:
                    trackers[0].picture(seen, "samples", Image.new("L", (8, 8)))
                show_row(trackers, seen, {"loss/total": seen / 4, "loss/kl": float("nan")})


def rows(database, query):
    with sqlite3.connect(database) as connection:
        return connection.execute(query).fetchall()


def test_wandb_writes_an_offline_run_for_each_attempt(job, caplog):
    attempts("wandb", job)
    assert "the job goes on" not in caplog.text
    identity = job.records.read_json("wandb.json")["id"]
    files = [*(job.folder / "wandb").glob("offline-run-*/*.wandb")]
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    wait_until(lambda: all(b"loss/total" in file.read_bytes() for file in files))  # written after the run is finished
    wait_until(lambda: len([*(job.folder / "wandb").glob("offline-run-*/files/media/images/samples_*.png")]) == 1)


def test_mlflow_continues_a_run_and_repeats_no_row(job, caplog, tmp_path):
    attempts("mlflow", job)
    assert "the job goes on" not in caplog.text
    metrics = rows(tmp_path / "mlflow.db", "select step, value from metrics where key = 'loss/total' order by step")
    assert metrics == [(4, 1), (8, 2), (12, 3), (16, 4), (20, 5), (24, 6)]
    assert rows(tmp_path / "mlflow.db", "select name, status from runs") == [("toy train_vavae", "FINISHED")]
    assert ("stream.lanes", "2") in rows(tmp_path / "mlflow.db", "select key, value from params")
    assert [*(tmp_path / "mlflow").rglob("samples*.png")]


def test_trackio_continues_a_run_and_repeats_no_row(job, caplog, tmp_path):
    attempts("trackio", job)
    assert "the job goes on" not in caplog.text
    identity = job.records.read_json("trackio.json")["id"]
    query = "select run_name, step from metrics where instr(cast(metrics as text), 'loss/total') order by step"
    found = rows(tmp_path / "trackio" / "vavae.db", query)
    assert found == [(f"toy train_vavae {identity[:8]}", step) for step in (4, 8, 12, 16, 20, 24)]
    assert [*(tmp_path / "trackio" / "media").rglob("*.png")]
