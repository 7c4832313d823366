"""Who can reach what runs here: nobody on another machine, and nobody else on this one has the keys."""

import stat
import subprocess
import sys

import psutil
import pytest
from support.sockets import beyond_loopback

from ray_jobs.runtime.cluster import TOKEN, keep_token_private
from vavae.storage.loopback import s3_server, why_no_s3_server


@pytest.mark.parametrize(("host", "beyond"), [("127.0.0.1", set()), ("0.0.0.0", {"0.0.0.0"})])
def test_listening_beyond_loopback_is_seen(host, beyond):
    serve = f"import socket; server = socket.create_server(({host!r}, 0)); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", serve], **pipes) as process:
        process.stdout.readline()
        assert set(beyond_loopback(psutil.Process(process.pid))) == beyond
        process.communicate(b"\n")


@pytest.mark.parametrize("before", [None, "made by Ray, which lets everybody read it"])
def test_the_token_of_a_local_ray_is_its_owners(tmp_path, monkeypatch, before):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = TOKEN.expanduser()
    if before is not None:
        path.parent.mkdir()
        path.write_text(before)
    for _ in range(2):
        keep_token_private()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_text() == (before or path.read_text())
        before = path.read_text()
    assert len(before) >= 32


@pytest.mark.skipif(why_no_s3_server() is not None, reason="JuiceFS' gateway is not installed")
def test_the_s3_server_is_on_loopback_and_its_keys_are_its_owners(tmp_path):
    with s3_server(tmp_path / "server", "mine") as server:
        gateways = [found for found in psutil.Process().children(recursive=True) if found.name() == "juicefs"]
        here = next(found for found in gateways if str(tmp_path) in " ".join(found.cmdline()))
        assert not beyond_loopback(here)
        readable = [path for path in (tmp_path / "server").rglob("*") if path.stat().st_mode & 0o077]
        assert not readable
        assert stat.S_IMODE((tmp_path / "server" / "environment").stat().st_mode) == 0o600
        secret = server.environment["AWS_SECRET_ACCESS_KEY"]
        words = [word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or ()]
        assert not [word for word in words if secret in word]
        holding = {
            path.name
            for path in (tmp_path / "server").rglob("*")
            if path.is_file() and secret.encode() in path.read_bytes()
        }
        assert holding == {"environment"}
