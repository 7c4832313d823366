"""The order of things in the training loop."""

import json
import math
import signal
import time
from collections.abc import Container, Mapping
from pathlib import Path

import pytest
import torch
from support.toy_training import ToyStep, toy_checkpoints, train_toy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from vavae.data.image_stream import MicroBatchKey
from vavae.progress import Progress
from vavae.runs.events import Event
from vavae.storage.storage import Storage
from vavae.training.logging.log import MetricsLog, read_rows
from vavae.training.session import LocalSession, stop_on_signals
from vavae.training.step import Step
from vavae.training.trainer import NonFiniteError


class ScriptedSession(LocalSession):
    """Asks to stop at one of its steps, has a machine preempted at another, and records all calls."""

    def __init__(self, stop_at_step: int | None = None, notice_at_step: int | None = None) -> None:
        self._stop_at, self._notice_at, self._steps = stop_at_step, notice_at_step, 0
        self._due_at: int | None = None
        self.checkpoints: list[int] = []
        self.shown: list[Progress] = []
        self.rows: list[Mapping[str, float]] = []
        self.events: list[Event] = []

    def progress(self, progress: Progress) -> None:
        self.shown.append(progress)

    def row(self, row: Mapping[str, float]) -> None:
        self.rows.append(row)

    def event(self, event: Event) -> None:
        self.events.append(event)

    def checkpoint(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        assert math.isfinite(metrics["loss/total"])
        self.checkpoints.append(images_seen)

    def stop_requested(self) -> bool:
        self._steps += 1
        return self._steps == self._stop_at

    def save_check_due(self) -> bool:
        if self._steps % 2 == 0:
            self._due_at = self._steps
        return self._steps % 2 == 0

    def must_save(self) -> bool:
        due_at, self._due_at = self._due_at, None
        assert due_at is not None, "called when it is due only"
        return due_at == self._notice_at


def _rows(storage: Storage) -> list[dict[str, float]]:
    return [
        {"images": row["images"], "loss": row["loss/total"], "norm": row["gradient_norm/toy"]}
        for row in read_rows(storage.child("log"))
    ]


class UpdateCounter:
    """Logs when it was called, and how often the average had been updated by then."""

    def __init__(self, every_images: int) -> None:
        self.every_images = every_images

    def on_interval(self, step: Step, images_seen: int, log: MetricsLog) -> None:
        log.add(images_seen, {"latent/updates": len(step.rates)})  # type: ignore[attr-defined]


def test_callbacks_run_at_their_intervals_after_the_update_and_share_the_row(storage: Storage) -> None:
    train_toy(storage, callbacks=[UpdateCounter(6)], images=24, checkpoint_images=12, log_images=12)
    rows = read_rows(storage.child("log"))
    assert [(row["images"], row.get("latent/updates"), "loss/total" in row) for row in rows] == [
        (8, 2, False),
        (12, 3, True),
        (20, 5, False),
        (24, 6, True),
    ]
    assert all(("observe_wait" in row) == ("loss/total" in row) for row in rows)


def test_intervals_count_images_and_the_end_is_saved(storage: Storage) -> None:
    session = ScriptedSession()
    assert train_toy(storage, session=session, images=21, checkpoint_images=9, log_images=6).images_seen == 24
    assert session.checkpoints == [12, 20, 24]
    assert [(event.event, event.images) for event in session.events] == [("checkpoint", at) for at in (12, 20, 24)]
    assert [row["loss/total"] for row in session.rows] == [row["loss"] for row in _rows(storage)]
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


def test_a_stop_saves_and_the_next_call_resumes(tmp_path: Path) -> None:
    straight, stopped = Storage(str(tmp_path / "straight")), Storage(str(tmp_path / "stopped"))
    step, again = ToyStep(), ToyStep()
    train_toy(straight, step, images=24, log_images=4)
    session = ScriptedSession(stop_at_step=3)
    assert train_toy(stopped, session=session, images=24, log_images=4).images_seen == 12
    assert session.checkpoints == [12]
    session = ScriptedSession()
    assert train_toy(stopped, again, session, images=24, log_images=4).images_seen == 24
    assert [(event.event, event.stage, event.images) for event in session.events] == [
        ("restored", "toy", 12),
        ("checkpoint", "toy", 24),
    ]
    assert len(again.rates) == 3
    assert again.model.weight.equal(step.model.weight)
    assert again.ema.weights()["weight"].equal(step.ema.weights()["weight"])
    assert _rows(stopped) == _rows(straight)


def test_a_preemption_notice_calls_for_a_checkpoint(storage: Storage) -> None:
    session = ScriptedSession(notice_at_step=4)
    assert train_toy(storage, session=session, images=24).images_seen == 24
    assert session.checkpoints == [20, 24], "all ranks know of it in the step after"
    unnoticed = ScriptedSession(notice_at_step=3)
    train_toy(Storage("memory://nobody-asks"), session=unnoticed, images=24)
    assert unnoticed.checkpoints == [24], "between two checks"


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


def test_the_last_rows_of_a_log_reach_over_its_segments(storage: Storage) -> None:
    log, other = (MetricsLog("toy", storage.child("log"), [], active=active) for active in (True, False))
    log.rewind(0)
    for images in (4, 8, 12, 16):
        log.add(images, {"loss/total": 1.0})
        if images % 8 == 0:
            log.flush_segment(images)()
    for count, images_seen, expected in ((3, 16, [8, 12, 16]), (9, 20, [4, 8, 12, 16]), (9, 12, [4, 8]), (9, 0, [])):
        assert [row["images"] for row in log.last_rows(count, images_seen)] == expected
    assert other.last_rows(9, 16) == []


def test_segments_are_json_lines_of_one_job(storage: Storage) -> None:
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
    """Meets NaN in some steps of its stream, and records which steps it was given."""

    def __init__(self, poisoned: Container[int]) -> None:
        super().__init__()
        self._poisoned = poisoned
        self.given: list[int] = []

    def __getitem__(self, key: MicroBatchKey) -> Tensor:
        self.given.append(key.step)
        batch = super().__getitem__(key)
        return batch * torch.nan if key.step in self._poisoned else batch


def test_a_step_with_gradients_that_are_not_finite_is_skipped(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    step, healthy = PoisonedStep([2]), PoisonedStep([])
    state = train_toy(storage, step, images=24, log_images=8)
    assert (state.images_seen, state.excluded, step.given) == (24, (), [0, 1, 2, 3, 4, 5])
    assert step.engine.updates == 5
    assert step.model.weight.isfinite().all()
    assert [row.get("skipped_steps") for row in read_rows(storage.child("log"))] == [None, 1, None]
    assert "toy: the step at 8 images is skipped: gradient_norm/toy nan, loss/total nan" in caplog.text
    for key in (0, 1, 3, 4, 5):
        healthy.run([healthy[MicroBatchKey(0, key)]], 0, 1e-4)
    assert healthy.model.weight.equal(step.model.weight), "as if it had never been there"


class ScaledStep(ToyStep):
    """Its loss is a thousand times as large in one step."""

    def __getitem__(self, key: MicroBatchKey) -> Tensor:
        return super().__getitem__(key) * (1000**0.5 if key.step == 150 else 1)


def test_a_loss_spike_is_reported_and_counted(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    session = ScriptedSession()
    train_toy(storage, ScaledStep(), session, images=4 * 200, log_images=4)
    assert [(event.event, event.images) for event in session.events][:1] == [("loss_spike", 600)]
    assert "toy: the step at 600 images has a loss far above those before it: gradient_norm/toy" in caplog.text
    assert [row["images"] for row in read_rows(storage.child("log")) if "loss_spikes" in row] == [604]


def test_after_too_many_the_training_is_rolled_back_and_skips_the_data_range(storage: Storage) -> None:
    step, session = PoisonedStep(range(4, 7)), ScriptedSession()
    state = train_toy(storage, step, session, images=32, checkpoint_images=8, log_images=4, skip_limit=1)
    # After two skipped steps the stream is at 24 images; the training resumes from 16, with the stream at 24.
    assert step.given == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert (state.images_seen, state.excluded) == (32, ((16, 24),))
    rows = read_rows(storage.child("log"))
    assert [row["images"] for row in rows] == [4, 8, 12, 16, 20, 24, 28, 32]
    assert [row["images"] for row in rows if "skipped_steps" in row] == [20]
    assert toy_checkpoints(storage).restore(ToyStep()).excluded == ((16, 24),)
    assert [(event.event, event.images) for event in session.events] == [
        ("checkpoint", 8),
        ("checkpoint", 16),
        ("skipped_step", 16),
        ("skipped_step", 20),
        ("rollback", 24),
        ("skipped_step", 16),
        ("checkpoint", 24),
        ("checkpoint", 32),
    ]


def test_what_is_excluded_stays_so_after_a_resume(tmp_path: Path) -> None:
    straight, halves = Storage(str(tmp_path / "straight")), Storage(str(tmp_path / "halves"))
    whole, parts = (PoisonedStep(range(4, 7)) for _ in range(2))
    config = {"checkpoint_images": 8, "skip_limit": 1}
    train_toy(straight, whole, images=48, **config)
    train_toy(halves, parts, images=32, **config)
    again = PoisonedStep(range(4, 7))
    train_toy(halves, again, images=48, **config)
    assert parts.given + again.given == whole.given
    assert again.model.weight.equal(whole.model.weight)


@pytest.mark.parametrize(
    ("poisoned", "limit", "seen"), [(range(100), 3, 8), (range(2, 100), 0, 16), (range(2, 100), 2, 16)]
)
def test_it_gives_up_without_a_checkpoint_or_after_rolling_back_in_vain(
    storage: Storage, poisoned: range, limit: int, seen: int
) -> None:
    step = PoisonedStep(poisoned)
    with pytest.raises(NonFiniteError, match=f"toy: gradients are not finite after {seen} images"):
        train_toy(storage, step, images=64, checkpoint_images=8, skip_limit=1, rollback_limit=limit)


def test_a_signal_to_a_process_and_its_group_is_one_and_a_later_one_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    stops: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_on_signals(lambda: stops.append(1)):  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        later = time.monotonic() + 2
        monkeypatch.setattr(time, "monotonic", lambda: later)
        assert len(stops) == 1
        signal.raise_signal(signal.SIGINT)
        pytest.fail("not interrupted")
    assert signal.getsignal(signal.SIGTERM) is before
