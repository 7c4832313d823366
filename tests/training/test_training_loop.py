"""The order of things in the training loop."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.toy import ToyStep, train_toy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vavae.progress import Progress
from vavae.storage.storage import Storage
from vavae.training.log import read_rows
from vavae.training.loop import NonFiniteError


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


class ScriptedSession:
    """Asks to stop at one of its steps, and remembers what it was told."""

    def __init__(self, stop_at_step: int | None = None) -> None:
        self._stop_at, self._steps = stop_at_step, 0
        self.checkpoints: list[int] = []
        self.shown: list[Progress] = []

    def progress(self, progress: Progress) -> None:
        self.shown.append(progress)

    def checkpoint(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        assert math.isfinite(metrics["loss/total"])
        self.checkpoints.append(images_seen)

    def stop_requested(self) -> bool:
        self._steps += 1
        return self._steps == self._stop_at


def _rows(storage: Storage) -> list[dict[str, float]]:
    return [
        {"images": row["images"], "loss": row["loss/total"], "norm": row["gradient_norm/toy"]}
        for row in read_rows(storage.child("log"))
    ]


def test_intervals_count_images_and_the_end_is_saved(storage: Storage) -> None:
    session = ScriptedSession()
    assert train_toy(storage, session=session, images=21, checkpoint_images=9, log_images=6).images_seen == 24
    assert session.checkpoints == [12, 20, 24]
    assert [row["images"] for row in _rows(storage)] == [8, 12, 20, 24]
    assert (session.shown[-1].done, session.shown[-1].total) == (24, 21)


def test_a_row_is_the_mean_of_its_steps(tmp_path: Path) -> None:
    single, pairs = Storage(str(tmp_path / "single")), Storage(str(tmp_path / "pairs"))
    train_toy(single, images=16, log_images=4)
    train_toy(pairs, images=16, log_images=8)
    rows = _rows(single)
    for row, first, second in zip(_rows(pairs), rows[::2], rows[1::2], strict=True):
        assert row["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
        assert row["norm"] == pytest.approx((first["norm"] + second["norm"]) / 2)


def test_a_stop_saves_and_the_next_call_goes_on(tmp_path: Path) -> None:
    straight, stopped = Storage(str(tmp_path / "straight")), Storage(str(tmp_path / "stopped"))
    step, again = ToyStep(), ToyStep()
    train_toy(straight, step, images=24, log_images=4)
    session = ScriptedSession(stop_at_step=3)
    assert train_toy(stopped, session=session, images=24, log_images=4).images_seen == 12
    assert session.checkpoints == [12]
    assert train_toy(stopped, again, images=24, log_images=4).images_seen == 24
    assert len(again.rates) == 3
    assert again.model.weight.equal(step.model.weight)
    assert again.ema.weights()["weight"].equal(step.ema.weights()["weight"])
    assert _rows(stopped) == _rows(straight)


def test_a_finished_run_does_nothing_until_its_budget_is_raised(storage: Storage) -> None:
    train_toy(storage, images=8)
    files = storage.list(recursive=True)
    step, session = ToyStep(), ScriptedSession()
    assert train_toy(storage, step, session, images=8).images_seen == 8
    assert (step.rates, session.checkpoints, storage.list(recursive=True)) == ([], [], files)
    train_toy(storage, step, images=16)
    assert len(step.rates) == 2


def test_what_an_attempt_logged_beyond_its_last_checkpoint_is_dropped(storage: Storage) -> None:
    train_toy(storage, images=8, checkpoint_images=4, log_images=4)
    rows = _rows(storage)
    storage.delete("checkpoints/000000000008")
    train_toy(storage, images=8, checkpoint_images=4, log_images=4)
    assert _rows(storage) == rows
    events = EventAccumulator(storage.url("tensorboard")).Reload()
    assert [scalar.step for scalar in events.Scalars("loss/total")] == [4, 8]


def test_segments_are_json_lines_of_one_stage(storage: Storage) -> None:
    train_toy(storage, images=8, checkpoint_images=4, log_images=4)
    assert storage.list("log") == ["log/000000000004.jsonl", "log/000000000008.jsonl"]
    for name in storage.list("log"):
        (line,) = storage.read_bytes(name).decode().splitlines()
        assert json.loads(line)["stage"] == "toy"


def test_the_rate_follows_the_schedule(storage: Storage) -> None:
    step = ToyStep()
    train_toy(storage, step, images=16, optimizer={"learning_rate": 0.1}, schedule={"warmup_images": 7})
    assert step.rates == pytest.approx([0.1 * 1 / 8, 0.1 * 5 / 8, 0.1, 0.1])


class PoisonedStep(ToyStep):
    """Meets a value that is no number in its third step."""

    def __getitem__(self, key):
        batch = super().__getitem__(key)
        return batch * torch.nan if key.step == 2 else batch


def test_a_gradient_that_is_no_number_ends_the_run_at_its_last_checkpoint(storage: Storage) -> None:
    with pytest.raises(NonFiniteError, match="toy: gradient_norm/toy is nan after 8 images"):
        train_toy(storage, PoisonedStep(), images=24, checkpoint_images=4)
    assert storage.child("checkpoints").list() == ["000000000004", "000000000008"]
