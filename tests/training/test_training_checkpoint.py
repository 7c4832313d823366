"""Which checkpoint a run goes on from, which ones stay, and which are refused."""

import logging
from pathlib import Path

import pytest
from support.toy import FRESH, ToyStep, toy_checkpoints, train_toy

from vavae.data.stream import SliceKey
from vavae.errors import UserError
from vavae.storage.artefact import RECORD
from vavae.storage.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def _saved(storage: Storage) -> list[str]:
    return storage.child("checkpoints").list()


def test_restore_gives_back_weights_optimiser_average_and_position(storage: Storage) -> None:
    step = ToyStep()
    train_toy(storage, step, images=12)
    other = ToyStep()
    state = toy_checkpoints(storage).restore(other)
    assert state.images_seen == 12
    assert other.model.weight.equal(step.model.weight)
    assert other.ema.weights()["weight"].equal(step.ema.weights()["weight"])
    # Equal moments: both go on alike.
    for each in (step, other):
        each.run([each[SliceKey(lane=0, step=3)]], 12, 1e-3)
    assert other.model.weight.equal(step.model.weight)


def test_nothing_there_is_a_fresh_start(storage: Storage) -> None:
    assert toy_checkpoints(storage).restore(ToyStep()) == FRESH


def test_the_last_ones_stay(storage: Storage) -> None:
    train_toy(storage, images=20, checkpoint_images=4, keep=3)
    assert _saved(storage) == ["000000000012", "000000000016", "000000000020"]


@pytest.mark.parametrize("damage", ["no record", "file missing", "file shorter", "record unreadable"])
def test_what_is_not_whole_is_passed_over(storage: Storage, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    train_toy(storage, images=8, checkpoint_images=4)
    newest = storage.child("checkpoints/000000000008")
    match damage:
        case "no record":
            newest.delete(RECORD)
        case "file missing":
            newest.delete("toy/00000.safetensors")
        case "file shorter":
            newest.write_bytes("toy/00000.safetensors", newest.read_bytes("toy/00000.safetensors")[:-1])
        case "record unreadable":
            newest.write_bytes(RECORD, b"{")
    with caplog.at_level(logging.WARNING):
        assert toy_checkpoints(storage).restore(ToyStep()).images_seen == 4
    assert "000000000008 is not whole and is passed over" in caplog.text
    assert train_toy(storage, images=8).images_seen == 8
    assert toy_checkpoints(storage).restore(ToyStep()).images_seen == 8


def test_a_damaged_one_ahead_does_not_outlive_the_good(storage: Storage) -> None:
    train_toy(storage, images=8, keep=1)
    storage.child("checkpoints/000000000008").delete("toy/00000.safetensors")
    train_toy(storage, images=4, keep=1)
    assert _saved(storage) == ["000000000004"]


def test_half_written_ones_do_not_pile_up(storage: Storage) -> None:
    storage.write_bytes("checkpoints/000000000004/toy/00000.safetensors", b"half")
    train_toy(storage, images=8)
    assert _saved(storage) == ["000000000008"]


@pytest.mark.parametrize("what", ["config", "data"])
def test_state_of_another_run_is_refused(storage: Storage, what: str) -> None:
    train_toy(storage, images=4)
    fresh = FRESH.model_copy(update={what: "another"})
    with pytest.raises(UserError, match=f"000000000004: made with another {what}; give the run another name"):
        toy_checkpoints(storage, fresh=fresh).restore(ToyStep())


def test_checkpoints_work_in_an_object_store() -> None:
    storage = Storage("memory://checkpoints-of-a-toy")
    step, other = ToyStep(), ToyStep()
    train_toy(storage, step, images=8, checkpoint_images=4)
    assert toy_checkpoints(storage).restore(other).images_seen == 8
    assert other.model.weight.equal(step.model.weight)
    assert any("tfevents" in name for name in storage.list("tensorboard"))
