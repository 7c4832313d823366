"""Checkpoints on a real S3 server whose answers fail, and which goes away in the middle of an upload."""

import uuid

import pytest
from support.faulty_proxy import PASSING, Fault, Plan, faulty
from support.toy_training import ToyStep, toy_checkpoints, train_toy

from vavae.errors import UserError
from vavae.storage.config import StorageOptions
from vavae.storage.loopback import S3Server
from vavae.storage.storage import Storage


def _reached(endpoint: str, root: str, attempts: int = 10) -> Storage:
    return Storage(root, options=StorageOptions(endpoint=endpoint, attempts=attempts, backoff_seconds=0.01))


@pytest.fixture
def root(s3: S3Server) -> str:
    return f"s3://{s3.bucket}/{uuid.uuid4().hex}"


def test_uploads_through_faults_are_complete(s3: S3Server, root: str) -> None:
    plan, step, restored = Plan(seed=4, kinds=PASSING, rate=0.3, silence_seconds=0.01), ToyStep(), ToyStep()
    with faulty(s3.endpoint, plan) as endpoint:
        train_toy(_reached(endpoint, root), step, images=16, checkpoint_images=4)
    assert plan.happened.total() > 10
    assert toy_checkpoints(_reached(s3.endpoint, root)).restore(restored).images_seen == 16
    assert restored.model.weight.equal(step.model.weight)


def test_a_store_that_goes_away_stops_the_run_at_the_next_checkpoint_and_it_resumes_later(
    s3: S3Server, root: str
) -> None:
    near, straight, again = _reached(s3.endpoint, root), ToyStep(), ToyStep()
    plan, step = Plan(seed=0, kinds=[Fault.ERROR_503], rate=1.0, within=f"checkpoints/{24:012d}"), ToyStep()
    with (
        faulty(s3.endpoint, plan) as endpoint,
        pytest.raises(UserError, match=r"no checkpoint could be written: .*; earlier ones stay"),
    ):
        train_toy(_reached(endpoint, root, attempts=2), step, images=48, checkpoint_images=12)
    assert len(step.rates) == 9, "it learns of what happened to the checkpoint at 24 images when it comes to 36"
    train_toy(near, again, images=48, checkpoint_images=12)
    assert len(again.rates) == 9
    train_toy(Storage("memory://straight"), straight, images=48)
    assert again.model.weight.equal(straight.model.weight)
