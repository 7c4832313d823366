"""Every path and variable that a command takes, wrong in every way: status 2 and one line, never a traceback."""

import builtins
import importlib
import io
import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

import ray_jobs.runtime.command
import ray_jobs.tune.command
from ray_jobs.submission import client
from vavae.cli.main import main
from vavae.runs.jobs import JOBS

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.yaml")
SWEEP = str(ROOT / "configs" / "sweeps" / "tiny.yaml")

Wrong = Callable[[Path, pytest.MonkeyPatch], Path]
"""Makes a path that is wrong in one way."""


def missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return folder / "missing.yaml"


def malformed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "malformed.yaml").write_bytes(b"\x80\x02}q\x00[\xff{: ")
    return folder / "malformed.yaml"


def empty(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "empty.yaml").touch()
    return folder / "empty.yaml"


def a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "folder.yaml").mkdir()
    return folder / "folder.yaml"


def below_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "file").touch()
    return folder / "file" / "below.yaml"


def too_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return folder / f"{'x' * 300}.yaml"


def unreadable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that nobody may open; root may open every one, so the calls are replaced."""
    path = folder / "unreadable.yaml"
    path.write_text("name: a")

    def refusing(function: Callable[..., object]) -> Callable[..., object]:
        def call(name: object, *arguments: object, **named: object) -> object:
            if isinstance(name, (str, os.PathLike)) and os.fspath(name) == str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return function(name, *arguments, **named)

        return call

    for module, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "scandir"), (os, "listdir")):
        monkeypatch.setattr(module, name, refusing(getattr(module, name)))
    return path


FILES: tuple[Wrong, ...] = (missing, malformed, empty, a_folder, below_a_file, too_long, unreadable)


@pytest.fixture(autouse=True)
def _no_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder and home, and no Ray: what is wrong is found before it starts."""

    def start(*_: object, **__: object) -> None:
        raise AssertionError("Ray is started")

    for name in [name for name in os.environ if name.startswith(("RAY_", "AWS_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in (ray_jobs.runtime.command, ray_jobs.tune.command):
        monkeypatch.setattr(module, "cluster", start)


@pytest.fixture
def line(capfd: pytest.CaptureFixture[str]) -> Callable[[Sequence[str]], str]:
    """The one line of a command that ends with status 2; a job's, where its first word is a module's."""

    def line(words: Sequence[str]) -> str:
        job = words[0].removeprefix("ray_jobs.")
        try:
            status = main(words) if job == words[0] else _run_job(job, words[1:])
        except SystemExit as error:
            status = error.code
        lines = capfd.readouterr().err.splitlines()
        assert (status, len(lines)) == (2, 1), "\n".join([str(status), *lines])
        return lines[0]

    return line


def _run_job(job: str, words: Sequence[str]) -> int:
    module = importlib.import_module(f"ray_jobs.{job}")
    if job == "tune_vf":
        return module.main(words)
    if job == "pipeline":
        return ray_jobs.runtime.command.pipeline("test", module.JOB_FUNCTIONS, words)
    return ray_jobs.runtime.command.main(job, "test", module.work, words)


def _submit(root: str) -> list[str]:
    return ["submit", "pipeline", "--dry-run", "--working-dir", str(ROOT), f"storage.root={root}"]


CONFIGURED = {
    **{job: [f"ray_jobs.{job}", "--config"] for job in (*JOBS, "pipeline", "tune_vf")},
    "status": ["status", "--config"],
    "plan": ["plan", "--gpus", "1xH100", "--config"],
    "train": ["train", "vavae", "--config"],
    "submit": ["submit", "pipeline", "--dry-run", "--config"],
    "import": ["import", "tokenizer", "weights.pt", "--config"],
    "export": ["export", "tokenizer", "weights.pt", "--config"],
    "bench": ["bench", "sample", "--config"],
}
"""Commands that take the configuration of a run, which comes last."""


@pytest.mark.parametrize("wrong", FILES)
@pytest.mark.parametrize("command", CONFIGURED)
def test_a_wrong_configuration_is_one_line(line, tmp_path, monkeypatch, command, wrong):
    assert str(tmp_path) in line([*CONFIGURED[command], str(wrong(tmp_path, monkeypatch))]) or wrong is empty


FILES_OF_COMMANDS = {
    "run of status": ["status", "PATH"],
    "run of sample": ["sample", "--classes", "0", "--seeds", "0", "--run", "PATH"],
    "run of report": ["report", "PATH"],
    "run of average": ["average", "PATH", "--std", "0.1"],
    "folder of index": ["data", "index", "PATH", "--train", "a", "--validation", "b"],
    "train of index": ["data", "index", "there", "--train", "PATH", "--validation", "b"],
    "classes of index": ["data", "index", "there", "--train", "a", "--validation", "b", "--classes", "PATH"],
    "folder of verify": ["data", "verify", "PATH"],
    "folder of stats": ["data", "stats", "PATH"],
    "tokenizer to import": ["import", "tokenizer", "PATH", "--config", TINY],
    "LightningDiT to import": ["import", "lightningdit", "PATH", "--config", TINY],
    "latents to import": ["import", "latents", "PATH", "--config", TINY],
    "latents to export": ["export", "latents", "PATH", "--config", TINY],
    "earlier results": ["bench", "metrics", "--compare", "PATH"],
    "working dir": [
        "submit",
        "pipeline",
        "--dry-run",
        "--config",
        TINY,
        "storage.root=s3://a/b",
        "--working-dir",
        "PATH",
    ],
}
"""Commands with paths of other files and folders."""


@pytest.mark.parametrize("wrong", FILES)
@pytest.mark.parametrize("command", FILES_OF_COMMANDS)
def test_a_wrong_path_is_one_line(line, tmp_path, monkeypatch, command, wrong):
    path = str(wrong(tmp_path, monkeypatch))
    assert "--help" not in line([path if word == "PATH" else word for word in FILES_OF_COMMANDS[command]])


KEYS = ("shards.source", "shards.validation_source", "train_vavae.start_from", "evaluate.reference", "teacher.weights")


@pytest.mark.parametrize("wrong", [missing, below_a_file, too_long])
@pytest.mark.parametrize("key", KEYS)
def test_a_path_of_a_configuration_that_leads_nowhere_is_one_line(line, tmp_path, monkeypatch, key, wrong):
    line(["ray_jobs.pipeline", "--config", TINY, f"{key}={wrong(tmp_path, monkeypatch)}"])


@pytest.mark.parametrize("wrong", [malformed, empty, unreadable, a_folder])
@pytest.mark.parametrize("key", ["shards.source", "shards.validation_source"])
def test_a_source_that_holds_no_images_is_one_line_and_leaves_nothing(line, tmp_path, monkeypatch, key, wrong):
    line(["ray_jobs.prepare_shards", "--config", TINY, f"{key}={wrong(tmp_path, monkeypatch)}"])
    assert not [*(tmp_path / "work").iterdir()]


def test_a_source_of_too_few_images_to_hold_some_out_is_one_line(line, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "one.png")
    words = line(["ray_jobs.prepare_shards", "--config", TINY, f"shards.source={tmp_path / 'images'}"])
    assert "validation_fraction=0.15 of 1 images leaves none for" in words


@pytest.mark.parametrize("command", ["ray_jobs.pipeline", "ray_jobs.tune_vf", "train", "import"])
@pytest.mark.parametrize("wrong", [malformed, below_a_file, too_long])
def test_a_root_that_can_not_be_written_is_one_line(line, tmp_path, monkeypatch, command, wrong):
    path = wrong(tmp_path, monkeypatch)
    if command == "ray_jobs.tune_vf":
        line([command, "--config", SWEEP, f"run.storage.root={path}"])
    else:
        line(
            [
                *{"train": ["train", "vavae"], "import": ["import", "tokenizer", "a.pt"]}.get(command, [command]),
                "--config",
                TINY,
                f"storage.root={path}",
            ]
        )


@pytest.mark.parametrize(
    "words",
    [
        ["status", "--config", TINY, "--hourly-price", "dear"],
        ["plan", "--config", TINY, "--gpus", "many"],
        ["plan", "--config", TINY, "--gpus", "1xH100", "--images", "1.5"],
        ["train", "nothing", "--config", TINY],
        ["import", "tokenizer", "--config", TINY],
        ["sample", "--run", "a"],
        ["average", "a"],
        ["average", "a", "--std", "wide"],
        ["data", "index", "a"],
        ["data"],
        ["nothing"],
        ["bench", "metrics", "--rounds", "x"],
        ["submit", "nothing", "--config", TINY],
        ["logs"],
        ["ray_jobs.sample"],
        ["ray_jobs.sample", "--config", TINY, "sample"],
        ["ray_jobs.sample", "--config", TINY, "sample.images=many"],
        ["ray_jobs.pipeline", "--config", TINY, "storage.root=nope://a"],
        ["ray_jobs.pipeline", "--config", TINY, "shards.source=torchvision:Nothing"],
        ["ray_jobs.pipeline", "--config", TINY, "shards.source=indexed:nothing"],
        ["ray_jobs.pipeline", "--config", TINY, f"name={'x' * 300}"],
        ["ray_jobs.pipeline", "--config", TINY, f"name={'x' * 300}", "--dry-run"],
        ["train", "vavae", "--config", TINY, f"name={'x' * 300}"],
        ["ray_jobs.tune_vf", "--config", SWEEP, f"name={'x' * 300}"],
    ],
    ids=lambda words: " ".join(words).replace(str(ROOT), "")[:60],
)
def test_a_wrong_word_is_one_line(line, words):
    line(words)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("RAY_ADDRESS", "http://127.0.0.1:PORT"),
        ("RAY_ADDRESS", "http://["),
        ("RAY_ADDRESS", "127.0.0.1:PORT"),
        ("RAY_ADDRESS", "ray://127.0.0.1:PORT"),
        ("RAY_ADDRESS", "nonsense"),
        ("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:PORT"),
    ],
)
@pytest.mark.parametrize("command", ["jobs", "logs", "stop"])
def test_a_wrong_address_is_one_line(line, monkeypatch, command, variable, value):
    with socket.create_server(("127.0.0.1", 0)) as server:
        value = value.replace("PORT", str(server.getsockname()[1]))
    monkeypatch.setenv(variable, value)
    assert value in line([command] if command == "jobs" else [command, "name"])


def test_a_dashboard_that_never_answers_is_one_line(line, monkeypatch):
    monkeypatch.setattr(client, "_ANSWER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert "no Ray dashboard answers" in line(["jobs"])


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_a_wrong_variable_of_torchrun_is_one_line(line, monkeypatch, variable):
    monkeypatch.setenv(variable, "first")
    assert f"{variable}=first: torchrun sets a number" in line(["train", "vavae", "--config", TINY])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["3.1"], "no Python 3.1 on the path: install one, or name it in VAVAE_PYTHON"),
        (["newest"], "--python wants a version such as 3.13, not 'newest'"),
        ([], "--python wants a version such as 3.13, not ''"),
    ],
)
def test_a_python_that_is_not_here(words: list[str], line: str):
    command = ["bash", str(ROOT / "tests/run.sh"), "--python", *words]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (found.returncode, found.stdout, found.stderr) == (2, "", f"error: {line}\n")
