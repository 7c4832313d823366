"""The image: a linter's rules, and versions that satisfy what the project asks for."""

import importlib.metadata
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "cluster/docker"
PINS = dict(line.split("==") for line in (DOCKER / "requirements.txt").read_text().split() if "==" in line)
NAMES = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PINS.items()}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_linter_is_content():
    hadolint = Path(sysconfig.get_path("scripts"), "hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint comes as a wheel for x86-64 alone")
    found = subprocess.run([hadolint, "--no-color", DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


def test_every_line_is_one_version():
    lines = [line for line in (DOCKER / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(PINS) > 50
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)


def requirements_of(lines):
    """What the lines ask for, with the project's own extras resolved."""
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            for extra in requirement.extras:
                yield from requirements_of(PROJECT["optional-dependencies"][extra])
        else:
            yield str(requirement)


@pytest.mark.parametrize(
    "line", sorted(requirements_of([*PROJECT["dependencies"], "vavae[quickstart,judge,fidelity,sweep]"]))
)
def test_the_versions_satisfy_the_project(line):
    requirement = Requirement(line)
    version = NAMES[re.sub(r"[-_.]+", "-", requirement.name).lower()]
    assert requirement.specifier.contains(version)


def test_nothing_that_the_versions_ask_for_is_left_open():
    left_open = []
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.name).lower()
        # Those of CUDA come with torch, which names their exact versions.
        if NAMES.get(name) != distribution.version.split("+")[0] or name == "torch":
            continue
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                version = NAMES.get(re.sub(r"[-_.]+", "-", requirement.name).lower())
                if version is None or not requirement.specifier.contains(version, prereleases=True):
                    left_open.append(f"{name} asks for {requirement}")
    assert left_open == []


def test_clusters_run_the_ray_of_the_image():
    assert f"rayVersion: {PINS['ray']}\n" in (ROOT / "cluster/kuberay/vavae.yaml").read_text()


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_the_last_stages_hold_the_code_above_everything_else(target):
    stage = (DOCKER / "Dockerfile").read_text().split(f" AS {target}\n")[1].split("\nFROM ")[0]
    code = stage.index("COPY vavae vavae")
    assert not re.search("requirements.txt|apt-get", stage[code:])
    assert stage.index("USER 1000") > code


def test_only_what_the_image_takes_is_sent():
    allowed = {
        line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.*)$", (DOCKER / "Dockerfile").read_text(), flags=re.M):
        copied |= set(line.split()[:-1])
    assert copied == allowed
    assert all((ROOT / path).exists() for path in allowed)
