"""The script that serves S3: its folder can be served again, and nothing outlives whoever started it."""

import os
import shlex
import signal
import subprocess
import sys

from support.waiting import wait_until

from vavae.storage.config import StorageOptions
from vavae.storage.loopback import SCRIPT, s3_server
from vavae.storage.s3 import RetryingS3
from vavae.storage.storage import Storage


def test_a_folder_is_served_again_with_what_is_in_it(s3, tmp_path, monkeypatch):
    for turn in range(2):
        with s3_server(tmp_path / "server", "again") as server:
            for name, value in server.environment.items():
                monkeypatch.setenv(name, value)
            RetryingS3.clear_instance_cache()
            storage = Storage("s3://again/a", options=StorageOptions(attempts=1))
            if turn == 0:
                storage.write_bytes("x", b"kept")
            assert storage.read_bytes("x") == b"kept"
    assert not (tmp_path / "server" / "environment").exists()


def test_the_server_ends_with_its_parent_and_takes_its_data_along(s3, tmp_path):
    folder = tmp_path / "server"
    line = f"bash {shlex.quote(str(SCRIPT))} {shlex.quote(str(folder))} gone --temporary & wait"
    parent = subprocess.Popen(["bash", "-c", line], env={**os.environ, "PYTHON": sys.executable})
    wait_until(lambda: (folder / "environment").exists())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not folder.exists())
