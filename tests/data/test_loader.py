"""Loader processes: small, without Ray, and with their training process until its end."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.loader_process import image_stream, is_alive, readers
from support.waiting import wait_until

from vavae.storage.storage import Storage

ROOT = Path(__file__).parents[2]
MAIN = """
import ray  # as the main module of Ray's workers does
from support.loader_process import stay_in_training

if __name__ == "__main__":
    stay_in_training()
"""
TORCH_ALONE = "import torch, psutil; print(psutil.Process().memory_info().rss / 2**20)"
HEAVY = "ray deepspeed torchvision timm scipy pandas matplotlib sklearn s3fs aiobotocore tensorboard torchmetrics"
"""Packages of other work than loading."""


class Training(NamedTuple):
    """A process that waits with its loader processes."""

    process: "subprocess.Popen[str]"
    readers: dict[str, dict[str, Any]]
    """Its loader processes by what they load."""


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    folder = tmp_path_factory.mktemp("training")
    (folder / "main.py").write_text(MAIN)
    temporary = folder / ("too-long-for-sockets-" * 5)
    temporary.mkdir()
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(temporary)}
    with subprocess.Popen(
        [sys.executable, "main.py"],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield Training(process, json.loads(process.stdout.readline()))


def test_a_loader_process_takes_little_more_memory_than_torch(training: Training) -> None:
    alone = float(subprocess.run([sys.executable, "-c", TORCH_ALONE], stdout=subprocess.PIPE, check=True).stdout)
    for name, reader in training.readers.items():
        process, server = (resident - alone for resident in reader["resident"])
        # The server has imported all that its forks share, and none of them has all of that resident.
        assert process <= 40, f"MiB more for {name} than torch's {alone:.0f}"
        assert 0 < server <= 40, f"MiB more for the fork server of {name} than torch's {alone:.0f}"
        assert not set(HEAVY.split()) & set(reader["modules"]), name


def test_no_loader_process_outlives_a_killed_training(training: Training) -> None:
    processes = {reader[which] for reader in training.readers.values() for which in ("process", "server")}
    assert all(map(is_alive, processes))
    training.process.kill()
    wait_until(lambda: not any(map(is_alive, processes)), why=lambda: processes)


def test_loader_processes_load_on_after_ctrl_c(storage: Storage) -> None:
    """A terminal sends it to all processes, and the training saves a checkpoint."""
    with closing(readers(image_stream(storage))) as steps:
        (before, *_) = next(steps)
        os.kill(before.process, signal.SIGINT)
        assert {reader.process for step in islice(steps, 10) for reader in step} == {before.process}
