"""Which checkpoint a training resumes from, which ones stay, and which are refused."""

import errno
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Event

import pytest
import torch
from support.gloo import GlooLauncher
from support.toy_training import FRESH, ToyStep, no_log, toy_checkpoints, train_toy
from torch import Tensor

from vavae.data.image_stream import MicroBatchKey
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.runs.training_config import BestConfig, LightningDiTTrainingConfig
from vavae.storage.artifact import RECORD, read
from vavae.storage.config import StorageOptions
from vavae.storage.storage import Storage
from vavae.training.checkpoints.checkpoint import Checkpoints, EarlierCheckpointError
from vavae.training.checkpoints.lease import SupersededError
from vavae.training.checkpoints.retention import Retention
from vavae.training.step import StepResult


def _saved(storage: Storage) -> list[str]:
    return storage.child("checkpoints").list()


def _file_of(storage: Storage, name: str) -> str:
    """Weights of a checkpoint, relative to its folder."""
    record = read(storage, f"checkpoints/{name}")
    assert record is not None
    return next(path for path in record.files if "/toy/" in path)


def test_restore_gives_back_weights_optimizer_average_and_position(storage: Storage) -> None:
    step = ToyStep()
    train_toy(storage, step, images=12)
    other = ToyStep()
    state = toy_checkpoints(storage).restore(other)
    assert state.images_seen == 12
    assert other.model.weight.equal(step.model.weight)
    assert other.ema.weights()["weight"].equal(step.ema.weights()["weight"])
    # Equal moments: both go on alike.
    for each in (step, other):
        each.run([each[MicroBatchKey(lane=0, step=3)]], 12, 1e-3)
    assert other.model.weight.equal(step.model.weight)


def test_nothing_there_is_a_fresh_start(storage: Storage) -> None:
    assert toy_checkpoints(storage).restore(ToyStep()) == FRESH


def test_the_last_ones_stay(storage: Storage) -> None:
    train_toy(storage, images=20, checkpoint_images=4, keep=3)
    assert _saved(storage) == ["000000000012", "000000000016", "000000000020"]


@pytest.mark.parametrize("damage", ["no record", "file missing", "file shorter", "a bit flipped", "record unreadable"])
def test_an_incomplete_checkpoint_is_skipped(storage: Storage, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    train_toy(storage, images=8, checkpoint_images=4)
    newest, file = storage.child("checkpoints/000000000008"), _file_of(storage, "000000000008")
    match damage:
        case "no record":
            newest.delete(RECORD)
        case "file missing":
            newest.delete(file)
        case "file shorter":
            newest.write_bytes(file, newest.read_bytes(file)[:-1])
        case "a bit flipped":
            data = newest.read_bytes(file)
            newest.write_bytes(file, data[:-1] + bytes([data[-1] ^ 1]))
        case "record unreadable":
            newest.write_bytes(RECORD, b"{")
    with caplog.at_level(logging.WARNING):
        assert toy_checkpoints(storage).restore(ToyStep()).images_seen == 4
    assert "000000000008 is incomplete and is skipped" in caplog.text
    assert train_toy(storage, images=8).images_seen == 8
    assert toy_checkpoints(storage).restore(ToyStep()).images_seen == 8


def test_a_step_that_awaits_a_checkpoint_does_not_begin_without_one(storage: Storage) -> None:
    train_toy(storage, images=8, keep=1)
    storage.child("checkpoints/000000000008").delete(_file_of(storage, "000000000008"))
    step = ToyStep()
    step.awaits_checkpoint = True
    with pytest.raises(EarlierCheckpointError):
        toy_checkpoints(storage).restore(step)
    train_toy(storage, images=4)
    assert toy_checkpoints(storage).restore(step).images_seen == 4
    assert not step.awaits_checkpoint


def test_a_damaged_one_ahead_does_not_outlive_the_good(storage: Storage) -> None:
    train_toy(storage, images=8, keep=1)
    storage.child("checkpoints/000000000008").delete(_file_of(storage, "000000000008"))
    train_toy(storage, images=4, keep=1)
    assert _saved(storage) == ["000000000004"]


def test_half_written_ones_do_not_pile_up(storage: Storage) -> None:
    storage.write_bytes("checkpoints/000000000004/attempt-1/toy/00000.safetensors", b"half")
    train_toy(storage, images=8)
    assert _saved(storage) == ["000000000008"]


@pytest.mark.parametrize(("mode", "kept"), [("min", [2, 6, 12]), ("max", [3, 4, 12])])
def test_the_best_stay_besides_the_last(storage: Storage, mode: str, kept: list[int]) -> None:
    losses = [5.0, 1.0, 7.0, 9.0, math.nan, 2.0, 3.0]
    checkpoints = toy_checkpoints(storage, 1, best=BestConfig(metric="loss/total", mode=mode, count=2))
    step = ToyStep()
    for number, loss in enumerate([*losses, *[4.0] * 5], start=1):
        checkpoints.save(step, FRESH.after(number), {"loss/total": loss}, no_log)
    checkpoints.wait_for_pending_save()
    assert _saved(storage) == [f"{number:012d}" for number in kept]


def test_those_that_are_named_are_saved_and_stay_but_ahead_of_the_newest(storage: Storage) -> None:
    section = LightningDiTTrainingConfig(images=64, batch_size=1, keep_checkpoints=1, keep_images=(2, 5, 9))
    checkpoints = Checkpoints(storage, FRESH, Retention.of(storage, section), World())
    assert [seen for seen in range(12) if checkpoints.is_due(seen)] == [2, 5, 9]
    step = ToyStep()
    for seen in (9, 2, 4, 5, 8):
        checkpoints.save(step, FRESH.after(seen), {}, no_log)
    checkpoints.wait_for_pending_save()
    assert _saved(storage) == [f"{number:012d}" for number in (2, 5, 8)]


def test_an_unknown_metric_is_reported(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    train_toy(storage, images=4, keep_best={"metric": "fid"})
    assert "keep_best.metric=fid is not a finite number in any row; there are: " in caplog.text
    assert "loss/total" in caplog.text


def test_an_attempt_that_was_superseded_neither_commits_nor_deletes(storage: Storage) -> None:
    old, step = toy_checkpoints(storage, keep=1, owner="the old one"), ToyStep()
    old.save(step, FRESH.after(4), {}, no_log)
    old.wait_for_pending_save()
    new = toy_checkpoints(storage, keep=1, owner="the new one")
    old.save(step, FRESH.after(8), {}, no_log)
    with pytest.raises(SupersededError, match=": the new one resumes this training now"):
        old.wait_for_pending_save()
    with pytest.raises(SupersededError):
        old.check_lease()
    new.check_lease()
    assert new.restore(ToyStep()).images_seen == 4
    new.save(step, FRESH.after(12), {}, no_log)
    new.wait_for_pending_save()
    assert _saved(storage) == ["000000000012"], "and what the old one left is cleared away"


def test_an_attempt_whose_files_were_cleared_away_says_who_did_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, step = toy_checkpoints(storage, owner="the old one"), ToyStep()
    slow = Slow(monkeypatch, cleared_away=True)
    old.save(step, FRESH.after(4), {}, no_log)
    toy_checkpoints(storage, owner="the new one")
    slow.passage.set()
    with pytest.raises(SupersededError, match=": the new one resumes this training now"):
        old.wait_for_pending_save()


def test_files_of_two_attempts_at_one_checkpoint_do_not_meet(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one is cut off in the middle of its upload, and its files come late."""
    slow, stale, fresh = Slow(monkeypatch), ToyStep(), ToyStep()
    with torch.no_grad():
        stale.model.weight.zero_()
    old = toy_checkpoints(storage)
    old.save(stale, FRESH.after(4), {}, no_log)
    monkeypatch.undo()
    new = toy_checkpoints(storage)
    new.save(fresh, FRESH.after(4), {}, no_log)
    new.wait_for_pending_save()
    slow.passage.set()
    with pytest.raises(SupersededError):
        old.wait_for_pending_save()
    restored = ToyStep()
    with torch.no_grad():
        restored.model.weight.zero_()
    assert toy_checkpoints(storage).restore(restored).images_seen == 4
    assert restored.model.weight.equal(fresh.model.weight)


@pytest.mark.parametrize("what", ["config", "data"])
def test_state_of_another_run_is_refused(storage: Storage, what: str) -> None:
    train_toy(storage, images=4)
    fresh = FRESH.model_copy(update={what: "another"})
    with pytest.raises(UserError, match=f"000000000004: made with another {what}; give the run another name"):
        toy_checkpoints(storage, fresh=fresh).restore(ToyStep())


def test_a_checkpoint_of_another_version_is_no_reason_to_begin_anew(storage: Storage) -> None:
    train_toy(storage, images=4)
    record = storage.read_json(f"checkpoints/000000000004/{RECORD}")
    del record["details"]["metrics"]
    storage.write_json(f"checkpoints/000000000004/{RECORD}", record)
    with pytest.raises(UserError, match=r"000000000004: written by another version of this program \(metrics\)"):
        toy_checkpoints(storage).restore(ToyStep())


def test_checkpoints_work_in_an_object_store() -> None:
    storage = Storage("memory://checkpoints-of-a-toy")
    step, other = ToyStep(), ToyStep()
    train_toy(storage, step, images=8, checkpoint_images=4)
    assert toy_checkpoints(storage).restore(other).images_seen == 8
    assert other.model.weight.equal(step.model.weight)
    assert any("tfevents" in name for name in storage.list("tensorboard"))


def test_a_flipped_bit_in_a_store_leads_to_the_one_before(caplog: pytest.LogCaptureFixture) -> None:
    storage = Storage("memory://a-flipped-bit")
    train_toy(storage, images=8, checkpoint_images=4)
    newest, file = storage.child("checkpoints/000000000008"), _file_of(storage, "000000000008")
    data = newest.read_bytes(file)
    newest.write_bytes(file, data[:-1] + bytes([data[-1] ^ 1]))
    assert toy_checkpoints(storage).restore(ToyStep()).images_seen == 4
    assert re.search(r"the SHA-256 of \S+ is another|its SHA-256 is not", caplog.text)


def test_a_checkpoint_without_checksums_of_tensors_is_read_as_a_whole(storage: Storage) -> None:
    step, other = ToyStep(), ToyStep()
    train_toy(storage, step, images=4)
    record = storage.read_json(f"checkpoints/000000000004/{RECORD}")
    del record["details"]["headers"]
    storage.write_json(f"checkpoints/000000000004/{RECORD}", record)
    assert toy_checkpoints(storage).restore(other).images_seen == 4
    assert other.model.weight.equal(step.model.weight)


def test_a_restore_needs_no_room_in_the_cache(tmp_path: Path) -> None:
    root, step, other = "memory://a-small-cache", ToyStep(), ToyStep()
    train_toy(Storage(root), step, images=8)
    small = Storage(root, str(tmp_path / "cache"), StorageOptions(cache_bytes=10))
    assert toy_checkpoints(small).restore(other).images_seen == 8
    assert other.model.weight.equal(step.model.weight)
    assert not (tmp_path / "cache").exists()


def test_a_rollback_needs_nothing_that_the_cache_has_dropped(tmp_path: Path) -> None:
    storage = Storage("memory://a-rollback", cache=str(tmp_path / "cache"))
    step = ToyStep()
    train_toy(storage, step, images=8)
    checkpoints = toy_checkpoints(storage)
    assert checkpoints.restore(ToyStep()).images_seen == 8
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    other = ToyStep()
    assert checkpoints.restore(other).images_seen == 8
    assert other.model.weight.equal(step.model.weight)


class Slow:
    """A storage whose files are not there before somebody lets them through.

    Args:
        monkeypatch: puts it in the place of the storage.
        cleared_away: another process deletes their folder before.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cleared_away: bool = False) -> None:
        self.passage = Event()
        put = Storage.create

        @contextmanager
        def create(storage: Storage, path: str) -> Iterator[Path]:
            with put(storage, path) as file:
                yield file
                assert self.passage.wait(10), "let through within ten seconds"
                if cleared_away:
                    file.unlink()

        monkeypatch.setattr(Storage, "create", create)


class Watching(ToyStep):
    """Looks at the checkpoints before every step, and lets them through before one."""

    def __init__(self, storage: Storage, slow: Slow, release_at: int) -> None:
        super().__init__()
        self._storage, self._slow, self._release_at = storage, slow, release_at
        self.committed: list[list[str]] = []

    def run(
        self,
        micro_batches: Sequence[Tensor],
        images_seen: int,
        learning_rate: float,
        before_update: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """See `Step.run`."""
        names = _saved(self._storage)
        self.committed.append([name for name in names if self._storage.exists(f"checkpoints/{name}/{RECORD}")])
        if images_seen == self._release_at:
            self._slow.passage.set()
        return super().run(micro_batches, images_seen, learning_rate, before_update)


def test_training_continues_while_a_checkpoint_is_written(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Watching(storage, Slow(monkeypatch), release_at=20)
    train_toy(storage, step, images=24, checkpoint_images=12)
    assert step.committed[:6] == [[]] * 6
    assert _saved(storage) == ["000000000012", "000000000024"]
    other = ToyStep()
    storage.child("checkpoints/000000000024").delete(RECORD)
    assert toy_checkpoints(storage).restore(other).images_seen == 12
    third = ToyStep()
    for number in range(3):
        third.run([third[MicroBatchKey(0, number)]], 0, 1e-4)
    assert other.model.weight.equal(third.model.weight), "of the moment at which it was taken"


def test_what_cannot_be_written_stops_the_run_at_the_next_one(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, step = Storage.create, ToyStep()

    def create(storage: Storage, path: str) -> AbstractContextManager[Path]:
        if path.startswith("000000000008"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return put(storage, path)

    monkeypatch.setattr(Storage, "create", create)
    with pytest.raises(UserError, match=r"written: 000000000008.*: No space left on device; free some space there"):
        train_toy(storage, step, images=24, checkpoint_images=4)
    assert len(step.rates) == 3, "it continues until then"
    assert toy_checkpoints(storage).restore(ToyStep()).images_seen == 4


def fail_on_the_last_rank(world: World, folder: Path) -> str:
    """The error of this rank."""
    step, storage = ToyStep(), Storage(str(folder))
    checkpoints = Checkpoints(storage, FRESH, Retention(2), world)
    if world.rank == world.size - 1:

        def create(storage: Storage, path: str) -> AbstractContextManager[Path]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

        Storage.create = create  # type: ignore[method-assign]
    checkpoints.save(step, FRESH.after(4), {}, no_log)
    try:
        checkpoints.wait_for_pending_save()
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.gloo
def test_all_ranks_stop_where_one_cannot_write(gloo: GlooLauncher, tmp_path: Path) -> None:
    errors = gloo.run(3, fail_on_the_last_rank, tmp_path)
    pattern = re.compile(r"000000000004/\w+-1/toy/00002.safetensors: Permission denied; change its rights")
    assert [pattern.search(error) is not None for error in errors] == [True] * 3
    assert not list(tmp_path.rglob(RECORD))
