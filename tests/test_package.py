"""The package as it is installed: configurations come along and are found by their names, wherever one is."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vavae.config.presets import preset_names

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which a wheel of this checkout is unpacked."""
    folder = tmp_path_factory.mktemp("package")
    checkout, installed = folder / "checkout", folder / "installed"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "vavae", "ray_jobs", "configs", "pyproject.toml", "README.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(checkout)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    return installed


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with the installed package."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def test_all_configurations_are_in_the_wheel(installed: Path) -> None:
    presets = installed / "vavae" / "presets"
    there = {path.relative_to(presets).as_posix() for path in presets.rglob("*") if path.is_file()}
    assert there == {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {path.name for path in installed.iterdir() if not path.name.endswith("-info")} == {"vavae", "ray_jobs"}


def test_names_are_enough_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    code = """
import vavae.runs
from vavae.config import load
from vavae.runs.config import RunConfig
from vavae.sweep.sweep import Sweep

print(vavae.runs.__file__)
for name in ("quickstart", "imagenet/f16d32_dinov2"):
    print(load(RunConfig, name).name)
print(Sweep.load("sweeps/tiny").config.name)
"""
    found = run(installed, tmp_path, "-c", code)
    assert found.returncode == 0, found.stderr
    file, *names = found.stdout.splitlines()
    assert Path(file).is_relative_to(installed)
    assert names == ["quickstart", "f16d32_dinov2", "tiny_sweep"]
    assert [*tmp_path.iterdir()] == []


def test_an_unknown_name_lists_those_that_there_are(installed: Path, tmp_path: Path) -> None:
    found = run(installed, tmp_path, "-m", "vavae", "status", "--config", "quickstar")
    assert found.returncode == 2
    names = ", ".join(preset_names())
    assert found.stderr == f"error: quickstar: no such file, and no configuration of the package; those are {names}\n"
