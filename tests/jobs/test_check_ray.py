"""A cluster that can't be joined, and a machine on which Ray can't start: one line before anything is written."""

import os
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ray._common.utils import try_to_create_directory

from ray_jobs.prepare_shards import work
from ray_jobs.runtime import cluster
from ray_jobs.runtime.cluster import check_ray, session_folder
from ray_jobs.runtime.command import main
from vavae.config import load
from vavae.runs.config import RunConfig


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cluster, "_ANSWER_SECONDS", 0.5)


def _line(root: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of a job that ends with status 2 and leaves nothing."""
    words = ["--config", "configs/tiny.yaml", f"storage.root={root}"]
    assert main("prepare_shards", "test", work, words) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert not root.exists()
    return line


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("http://127.0.0.1:8265", "is the dashboard's, which vavae submit takes"),
        ("ray://127.0.0.1:10001", "is none that jobs can join"),
        ("nonsense", "no Ray cluster answers there (Invalid address format: nonsense)"),
        ("127.0.0.1:port", "no Ray cluster answers there (Port could not be cast to integer value as 'port')"),
        ("http://[", "is the dashboard's, which vavae submit takes"),
    ],
)
def test_an_address_of_another_form_is_one_line(tmp_path, monkeypatch, capfd, address, why):
    monkeypatch.setenv("RAY_ADDRESS", address)
    line = _line(tmp_path / "runs", capfd)
    assert line.startswith(f"error: RAY_ADDRESS={address}")
    assert why in line
    assert "give HOST:PORT of the cluster's head, or unset it to start Ray here" in line


def test_a_dead_cluster_is_one_line(tmp_path, monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert f"RAY_ADDRESS={address}: no Ray cluster answers there ([Errno" in _line(tmp_path / "runs", capfd)


def test_a_server_that_is_no_cluster_is_one_line(tmp_path, monkeypatch, capfd):
    class Silent(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.server_address[1]}")
        assert "what listens is none, or did not answer in 0.5 s" in _line(tmp_path / "runs", capfd)
        server.shutdown()


def test_a_home_that_can_not_be_written_is_one_line(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    line = _line(tmp_path / "runs", capfd)
    assert line.startswith(
        f"error: {tmp_path / 'file'}/.ray/auth_token: Ray's token can't be kept there (Not a directory)"
    )


@pytest.mark.parametrize("address", ["", "local"])
def test_without_an_address_ray_is_started_here(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert check_ray() is None


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_the_session_folder_is_private_short_enough_for_sockets_and_temporary(tmp_path, monkeypatch, variable):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for place in ("/tmp/.", str(tmp_path / ("d" * 80))):
        monkeypatch.setenv(variable, place)
        with session_folder() as folder:
            private = Path(folder).parent
            assert Path(folder).is_relative_to(os.path.abspath(place)) == (place == "/tmp/.")
            assert private.stat().st_mode & 0o777 == 0o700
            try_to_create_directory(folder)  # as Ray does: open to everybody
            sockets = Path(folder, "session_2026-01-01_00-00-00_000000_4194304", "sockets", "s" * 24)
            assert len(os.fsencode(sockets)) <= 103
        assert not private.exists()


@pytest.mark.parametrize("starting", [True, False])
def test_sigterm_interrupts_a_job_while_ray_starts_and_runs(monkeypatch, tmp_path, starting):
    def init(*args, **options):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does
        if starting:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: signal.signal(signal.SIGTERM, before))
    monkeypatch.setattr(cluster, "_stay_on_loopback", lambda: None)
    config, before = (
        load(RunConfig, "configs/tiny.yaml", [f"storage.root={tmp_path}"]),
        signal.getsignal(signal.SIGTERM),
    )
    with pytest.raises(KeyboardInterrupt), cluster.cluster(config):
        signal.raise_signal(signal.SIGTERM)
