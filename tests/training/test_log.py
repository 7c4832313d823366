"""Rows of the log: figures that are not finite are null in files, and shown nowhere."""

import json
import math

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vavae.storage.storage import Storage
from vavae.tracking.tensorboard_tracker import TensorBoardTracker
from vavae.tracking.tracker import TrackedJob
from vavae.tracking.trackers import track
from vavae.training.logging.log import MetricsLog, latest_row, read_rows, rows_text

ROW = {"loss/total": 0.5, "latent/spectrum_slope": math.nan, "gradient_norm": math.inf}


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_a_figure_that_is_not_finite_is_null_in_the_log_and_not_in_tensorboard(storage: Storage) -> None:
    log = MetricsLog("toy", storage.child("log"), [TensorBoardTracker(storage.child("tensorboard"))], active=True)
    log.rewind(0)
    log.add(8, ROW)
    log.flush_segment(8)()
    segments = storage.child("log")
    line = json.loads(segments.read_bytes(segments.list()[0]), parse_constant=refuse)
    expected = {"loss/total": 0.5, "latent/spectrum_slope": None, "gradient_norm": None}
    assert line == {"stage": "toy", "images": 8, **expected}
    (row,) = read_rows(segments)
    assert math.isnan(row["gradient_norm"])
    assert row.keys() == latest_row(segments).keys() == line.keys()
    assert json.loads(rows_text([row]), parse_constant=refuse) == line
    assert scalars(storage.url("tensorboard")) == ["loss/total"]


def test_tensorboard_of_a_checkpoint_has_no_others_either(storage: Storage) -> None:
    job = TrackedJob("run", "measured", {}, storage, storage, storage)
    track(["tensorboard"], job, 8, ROW)
    assert scalars(storage.url()) == ["loss/total"]


def scalars(folder: str) -> list[str]:
    return EventAccumulator(folder).Reload().Tags()["scalars"]
