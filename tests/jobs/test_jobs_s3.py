"""The whole system on a real S3 server, killed on the way; no key is left anywhere."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.waiting import wait_until

from vavae.storage.config import StorageOptions
from vavae.storage.loopback import S3Server, s3_server
from vavae.storage.s3 import RetryingS3
from vavae.storage.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.jobs, pytest.mark.long]

SECONDS = 600


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with (
        s3_server(tmp_path_factory.mktemp("s3") / "server", "vavae-jobs") as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in server.environment.items():
            patch.setenv(name, value)
        RetryingS3.clear_instance_cache()
        yield server


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of Ray's own: the paths of its sockets must be short."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        yield Path(folder)


def start(server: S3Server, place: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ray_jobs.pipeline", "--config", "configs/tiny.yaml"]
    storage = [f"storage.root=s3://{server.bucket}/runs", f"storage.cache={place / 'cache'}"]
    environment = {**os.environ, "RAY_TMPDIR": str(place)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *storage], env=environment, start_new_session=True, **pipes)


def test_pipeline_on_s3_survives_kill_and_leaves_no_key(server: S3Server, place: Path) -> None:
    run = Storage(f"s3://{server.bucket}/runs/tiny", str(place / "cache"), StorageOptions())
    first = start(server, place)

    def has_trained() -> bool:
        assert first.poll() is None, first.communicate()
        return any(path.endswith(".json") for path in run.list("lightningdit", recursive=True))

    wait_until(has_trained, SECONDS)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()

    outputs = []
    for _ in range(2):
        again = start(server, place)
        output, error = again.communicate(timeout=SECONDS)
        assert again.returncode == 0, error
        outputs.append(output)
    assert outputs[0].count(" made ") == 3
    assert (outputs[1].count(" done "), outputs[1].count("starting Ray")) == (6, 0)

    keys = [server.environment[name].encode() for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    stored = {path: run.read_bytes(path) for path in run.list(recursive=True)}
    assert {"report.html", "samples.png", "metrics.json", "config.yaml"} <= {*stored}
    logs = {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert [path for path in logs if path.endswith(".log")], "Ray logs somewhere else"
    assert not [path for path, data in (stored | logs).items() if any(key in data for key in keys)]
