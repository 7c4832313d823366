"""The watch over spot machines, with a cloud and a Ray that are played."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster/ray_up/drain.sh"
AWS = """
case "$*" in
*api/token*) echo secret ;;
*secret*instance-action*) [ -e notice ] && echo '{"action": "terminate"}' ;;
*) exit 22 ;;
esac
"""
GCP = "[ -e notice ] && echo TRUE || echo FALSE"


def drain(folder, cloud, curl):
    """Run the script until it ends; the notice comes with the third look."""
    for name, body in {
        "curl": f'echo >>looks\n[ "$(wc -l <looks)" -lt {5 if cloud == "aws" else 3} ] || touch notice\n{curl}',
        "ray": 'echo "$@"',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "DRAIN_POLL_SECONDS": "0.01"}
    return subprocess.run(
        ["bash", SCRIPT, *cloud.split()], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(("cloud", "curl", "seconds"), [("aws", AWS, 110), ("gcp", GCP, 25)])
def test_ray_is_told_when_the_notice_comes(tmp_path, cloud, curl, seconds):
    found = drain(tmp_path, cloud, curl)
    assert found.returncode == 0
    assert found.stdout.startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION ")
    assert found.stdout.rstrip().endswith(f"--deadline-remaining-seconds {seconds}")
    assert (tmp_path / "looks").read_text().count("\n") >= 3, "it went on looking"


@pytest.mark.parametrize("cloud", ["", "azure"])
def test_another_cloud_is_refused(tmp_path, cloud):
    found = drain(tmp_path, cloud, GCP)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: drain.sh takes aws or gcp")
