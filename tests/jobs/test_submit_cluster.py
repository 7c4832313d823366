"""A job on a real cluster, from outside over HTTP: submitted, followed, stopped with a checkpoint, submitted again."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.ray_head import Head, ray_head
from support.sockets import beyond_loopback

from vavae.config import load
from vavae.data.shards.write import write_shards
from vavae.report.run_status import TrainingStatus, run_status
from vavae.runs.config import RunConfig
from vavae.runs.jobs import JOBS
from vavae.runs.run import Run

pytestmark = [pytest.mark.ray, pytest.mark.jobs, pytest.mark.timeout(1800)]

CONFIG = "configs/tiny.yaml"
SECONDS = 600
BATCHES = 2
"""Batches that the second submission trains beyond the checkpoint of the first."""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(cpus=2) as head:
        yield head


def vavae(*words: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-m", "vavae", *words], env=environment, **pipes)


def said(*words: str, head: Head, **variables: str) -> tuple[int, str]:
    process = vavae(*words, environment={**head.environment, **variables})
    text, _ = process.communicate(timeout=SECONDS)
    return process.returncode, text


def test_the_head_listens_on_loopback_alone(head: Head) -> None:
    assert not beyond_loopback(psutil.Process(head.process.pid))


def test_nobody_is_let_in_without_the_token(head: Head, tmp_path: Path) -> None:
    status, text = said("jobs", head=head, RAY_AUTH_TOKEN="of somebody else", RAY_AUTH_TOKEN_PATH="")
    assert status == 2
    assert re.fullmatch(
        r"error: RAY_ADDRESS=http://127.0.0.1:\d+: .*see RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH\n", text
    )
    (tmp_path / "token").write_text(head.token)
    (tmp_path / "token").chmod(0o644)
    status, text = said("jobs", head=head, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert (status, text.count("\n")) == (2, 1)
    assert "others on this machine can read the token; chmod 600" in text
    assert head.token not in text


def stopped_in_training(head: Head, *submit: str) -> TrainingStatus:
    """Submit a job with an endless training, leave it alone once that has begun, and stop it; how far it came."""
    endless = [f"train_vavae.{key}=1_000_000" for key in ("images", "checkpoint_images")]
    follower = vavae(*submit, *endless, "--env", "NOTE=two words", environment={**head.environment})
    assert follower.stdout is not None
    shown = []
    for line in follower.stdout:
        shown.append(line)
        if line.startswith("train_vavae ") and "images/s" in line:
            break
    follower.send_signal(signal.SIGINT)
    rest, _ = follower.communicate(timeout=SECONDS)
    text = "".join([*shown, rest])
    assert follower.returncode == 130, text
    (name,) = re.findall(r"^submitted to http://\S+: (tiny-\w+-\d+-\d+)$", text, re.MULTILINE)
    assert f"{name} keeps running: vavae logs {name} --follow shows it again, vavae stop {name} stops it" in rest

    status, text = said("stop", name, head=head)
    assert (status, f"{name} has stopped; submitted again" in text) == (0, True), text
    status, text = said("jobs", head=head)
    assert re.search(rf"^{name} +stopped +\w+ +tiny ", text, re.MULTILINE), text
    status, text = said("logs", name, head=head)
    assert "stopping after a checkpoint; press Ctrl-C again to exit now" in text
    assert text.rstrip().endswith("interrupted")
    assert head.token not in text
    (root,) = (word.partition("=")[2] for word in submit if word.startswith("storage.root="))
    run = Run.at(f"{root}/tiny")
    training = run_status(run, run.plans(sources=False))[1].training
    assert training is not None
    assert training.seen > 0
    return training


def run_of(root: Path, name: str) -> Run:
    return Run(load(RunConfig, CONFIG, [f"storage.root={root}", f"name={name}"]))


def test_a_stopped_job_resumes_as_if_nothing_had_happened(head: Head, tmp_path: Path) -> None:
    root = tmp_path / "all runs"
    run = run_of(root, "tiny")
    write_shards(run.storage, run.prefix("prepare_shards"), run.config.shards, lambda done, total: None)
    shutil.copytree(root / "tiny" / "shards", root / "undisturbed" / "shards")
    submit = ["submit", "train_vavae", "--config", CONFIG, f"storage.root={root}", "--follow"]
    seen = stopped_in_training(head, *submit).seen
    budget = f"train_vavae.images={seen + BATCHES * run.config.train_vavae.batch_size}"
    status, text = said(*submit, budget, head=head)
    assert status == 0, text
    assert [job for job in JOBS if f"{job:<18} made" in text] == ["train_vavae"], "the shards were there"
    assert text.rstrip().endswith(": succeeded")

    words = ["train", "vavae", "--config", CONFIG, f"storage.root={root}", "name=undisturbed", budget]
    alone = vavae(*words, environment={**os.environ})
    text, _ = alone.communicate(timeout=SECONDS)
    assert alone.returncode == 0, text
    made, expected = (run_of(root, name).require("train_vavae") for name in ("tiny", "undisturbed"))
    assert made.images_seen == expected.images_seen
    assert made.digest == expected.digest, "the same bits"
