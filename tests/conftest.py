"""What all tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from support.gloo import GlooLauncher

from vavae.storage.loopback import S3Server, s3_server, why_no_s3_server
from vavae.storage.storage import Storage

settings.register_profile("untimed", deadline=None)  # a busy machine fails no test
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty folder of this test's."""
    return Storage(str(tmp_path / "storage"))


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooLauncher]:
    """Runs functions on the ranks of a new gloo world."""
    launcher = GlooLauncher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def _s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    reason = why_no_s3_server()
    if reason:
        pytest.skip(reason)
    with s3_server(tmp_path_factory.mktemp("s3") / "server", "vavae-tests") as server:
        yield server


@pytest.fixture
def s3(_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A server for all tests, with its keys and endpoint in the environment."""
    from vavae.storage.s3 import RetryingS3  # slow, and of no use to most tests

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in _s3.environment.items():
        monkeypatch.setenv(name, value)
    RetryingS3.clear_instance_cache()  # they took their keys from the environment
    return _s3
