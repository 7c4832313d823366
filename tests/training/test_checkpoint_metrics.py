"""Checkpoints that are due stay until they are evaluated or skipped, and the best of them longer."""

import pytest
from support.toy_training import ToyStep, train_toy

from vavae.storage.storage import Storage
from vavae.training.checkpoints.metrics import CheckpointMetrics
from vavae.training.checkpoints.retention import Retention

BATCH, EVERY, NEVER = 4, 10, 10_000
DUE = [12, 20, 32]


@pytest.fixture
def evaluations(storage: Storage) -> CheckpointMetrics:
    return CheckpointMetrics(storage, EVERY, BATCH)


def _saved(storage: Storage) -> list[int]:
    return [int(name) for name in storage.child("checkpoints").list()]


def _metrics(distance: float) -> dict[str, dict[str, object]]:
    return {"generation_frechet_distance": {"value": distance, "protocol": "custom: 8 samples"}}


def test_the_first_step_to_reach_a_multiple_is_due(evaluations: CheckpointMetrics) -> None:
    assert [seen for seen in range(0, 36, BATCH) if evaluations.is_due(seen)] == DUE


def test_due_checkpoints_are_saved_and_wait(storage: Storage, evaluations: CheckpointMetrics) -> None:
    train_toy(storage, images=36, checkpoint_images=NEVER, keep=1, evaluations=evaluations)
    assert _saved(storage) == [*DUE, 36]
    assert evaluations.waiting() == DUE


def test_evaluated_and_skipped_checkpoints_are_pruned(storage: Storage, evaluations: CheckpointMetrics) -> None:
    train_toy(storage, images=28, checkpoint_images=NEVER, keep=1, evaluations=evaluations)
    evaluations.write(12, _metrics(3.0))
    evaluations.write(20, {})
    train_toy(storage, images=36, checkpoint_images=NEVER, keep=1, evaluations=CheckpointMetrics(storage, EVERY, BATCH))
    assert _saved(storage) == [32, 36]


def test_the_best_stays(storage: Storage, evaluations: CheckpointMetrics) -> None:
    best = {"metric": "generation_frechet_distance"}
    train_toy(storage, images=36, checkpoint_images=NEVER, keep=1, keep_best=best, evaluations=evaluations)
    for seen, distance in zip(DUE, (3.0, 1.0, 2.0), strict=True):
        evaluations.write(seen, _metrics(distance))
    train_toy(storage, ToyStep(), images=40, checkpoint_images=NEVER, keep=1, keep_best=best, evaluations=evaluations)
    assert _saved(storage) == [20, 40]
    assert evaluations.summary() == "3 evaluated; best generation_frechet_distance 1 after 20 images"


def test_an_incomplete_checkpoint_does_not_wait(storage: Storage, evaluations: CheckpointMetrics) -> None:
    storage.write_bytes(f"checkpoints/{12:012d}/attempt-1/ema/00000.safetensors", b"half")
    assert evaluations.waiting() == []


def test_without_evaluations_nothing_waits(storage: Storage) -> None:
    train_toy(storage, images=36, checkpoint_images=NEVER, keep=1)
    assert _saved(storage) == [36]
    assert not Retention(1).is_due(12)
