"""A Ray head with its dashboard and token authentication, on loopback and free ports, for as long as a block."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from support.waiting import wait_until

_START_SECONDS = 180
_PORTS = ("--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port", "--metrics-export-port")


class Head(NamedTuple):
    """A cluster of one machine."""

    process: subprocess.Popen[bytes]
    environment: Mapping[str, str]
    """Address and token, for whoever speaks to it."""
    token: str


@contextmanager
def ray_head(cpus: int) -> Iterator[Head]:
    """Start a head, and end it with its jobs."""
    with tempfile.TemporaryDirectory(prefix="ray") as name:  # the paths of Ray's sockets must be short
        folder, token = Path(name), secrets.token_hex(32)
        (folder / "token").touch(mode=0o600)
        (folder / "token").write_text(token)
        ports = _free_ports(len(_PORTS))
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback alone
        }
        command = [unquoted_interpreter(folder), "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0"]
        command += [f"--num-cpus={cpus}"]
        command += ["--dashboard-host=127.0.0.1", "--disable-usage-stats", "--temp-dir", name]
        command += [f"{option}={port}" for option, port in zip(_PORTS, ports, strict=True)]
        log = folder / "head.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            _wait(process, log)
            yield Head(process, {**environment, "RAY_ADDRESS": f"http://127.0.0.1:{ports[0]}"}, token)
        finally:
            process.terminate()
            process.wait()


def unquoted_interpreter(folder: Path) -> str:
    """This interpreter by a path in `folder`, for Ray, whose nodes start workers through a shell without quotes."""
    (folder / "environment").symlink_to(sys.prefix)
    return str(folder / "environment" / "bin" / "python")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    def is_started() -> bool:
        assert process.poll() is None, log.read_text()
        return "Ray runtime started" in log.read_text()

    wait_until(is_started, _START_SECONDS, log.read_text)
