"""What is submitted and uploaded, and what is never: secrets, data, and what only a checkout needs."""

import importlib.util
import re
import shlex
import subprocess
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from ray_jobs.submission import client
from ray_jobs.submission.submission import GRACE, Subject, describe, refuse_secrets, variables_of
from ray_jobs.submission.submittable import SUBMITTABLE
from ray_jobs.submission.upload import config_inside, unpacked
from vavae.cli.main import main
from vavae.config import digest, load
from vavae.errors import UserError
from vavae.runs.config import RunConfig
from vavae.runs.jobs import JOBS

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 11, 23, 17, 5, 9)
SECRET = "wJalrXUtnFEMI"


def submission(arguments=(), variables=None, pip=(), folder=ROOT):
    subject = Subject.load("train_vavae", "configs/tiny.yaml", ["storage.root=s3://bucket/runs"])
    return describe(
        "train_vavae", subject, ["--config", "configs/tiny.yaml", *arguments], folder, variables or {}, pip, NOW
    )


def test_all_jobs_can_be_submitted():
    assert {"pipeline", "tune_vf", *JOBS} == {*SUBMITTABLE}
    assert all(importlib.util.find_spec(f"ray_jobs.{job}") for job in SUBMITTABLE)


def test_the_name_tells_run_job_and_time():
    assert submission().id == "tiny-train_vavae-20261123-170509"


def test_a_sweep_can_be_submitted():
    config = "configs/sweeps/tiny.yaml"
    subject = Subject.load("tune_vf", config, ["run.storage.root=s3://bucket/runs"])
    found = describe("tune_vf", subject, ["--config", config], ROOT, {}, (), NOW)
    assert found.id == "tiny_sweep-tune_vf-20261123-170509"
    assert (found.metadata["run"], found.metadata["storage"]) == ("tiny_sweep", "s3://bucket/runs")
    assert found.metadata["config"] != Subject.load("tune_vf", config, ["seeds=[7]"]).digest


def test_the_command_keeps_words_together():
    words = ["storage.root=/mnt/my runs", "shards.source=it's; rm -rf /", "name=$HOME"]
    assert shlex.split(submission(words).entrypoint)[-3:] == words
    assert submission().entrypoint == "python -m ray_jobs.train_vavae --config configs/tiny.yaml"


def test_metadata_are_texts_that_tell_what_runs(tmp_path):
    metadata = submission().metadata
    assert all(isinstance(value, str) for value in metadata.values())
    config = load(RunConfig, "configs/tiny.yaml")
    assert (metadata["run"], metadata["job"], metadata["config"]) == ("tiny", "train_vavae", digest(config))
    assert "commit" not in submission(folder=tmp_path).metadata
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    commit = submission(folder=tmp_path).metadata["commit"]
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "file").write_text("2")
    assert submission(folder=tmp_path).metadata["commit"] == f"{commit}-dirty"


def test_a_stopped_job_has_time_to_save():
    assert int(submission().runtime_env["env_vars"][GRACE]) > 60
    asked = submission(variables={GRACE: "1800", "NCCL_DEBUG": "INFO"}, pip=["x==1"]).runtime_env
    assert asked == {"env_vars": {GRACE: "1800", "NCCL_DEBUG": "INFO"}, "pip": ["x==1"]}


def test_variables_are_given_or_taken_from_here():
    assert variables_of(["A=1=2", "B", "C="], {"B": "here"}) == {"A": "1=2", "B": "here", "C": ""}
    with pytest.raises(UserError, match="--env B: not set here; give --env B=value"):
        variables_of(["B"], {})
    with pytest.raises(UserError, match=r"--env OMP_NUM_THREADS: .* use workers.threads"):
        variables_of(["OMP_NUM_THREADS=4"], {})


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SESSION_TOKEN",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "RAY_AUTH_TOKEN",
        "MINIO_ROOT_PASSWORD",
        "db_passwd",
        "APIKEY",
    ],
)
def test_secrets_are_refused_by_name_and_by_value(name):
    for item in (name, f"{name}={SECRET}"):
        with pytest.raises(UserError, match=rf"--env {name}: looks like a secret") as caught:
            variables_of([item], {name: SECRET})
        assert SECRET not in str(caught.value)
    hiding = [
        submission([f"storage.profile={SECRET}"]),
        submission(variables={"A": f"x{SECRET}"}),
        submission(pip=[SECRET]),
    ]
    for found in hiding:
        with pytest.raises(UserError, match=f"holds the value of {name}") as caught:
            refuse_secrets(found, {name: SECRET})
        assert SECRET not in str(caught.value)
    refuse_secrets(submission(), {name: SECRET})


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "GIT_AUTHOR_NAME", "AWS_SHARED_CREDENTIALS_FILE"]
)
def test_other_names_are_no_secrets(name):
    assert variables_of([f"{name}=x"], {}) == {name: "x"}
    refuse_secrets(submission(["name=something-long"]), {name: "something-long"})


@pytest.mark.parametrize("where", ["arguments", "pip", "variables"])
def test_urls_with_credentials_are_refused(where):
    url = f"https://user:{SECRET}@host/x"
    with pytest.raises(UserError, match="credentials in it") as caught:
        refuse_secrets(submission(**{where: {"A": url} if where == "variables" else [url]}), {})
    assert SECRET not in str(caught.value)


def test_the_upload_is_small_and_whole(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for path in tracked:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    left_out = [
        ".env",
        ".env.local",
        "runs/a/config.yaml",
        "data/000000.tar",
        "my.key",
        ".venv/x.py",
        ".git/x",
        "w.safetensors",
    ]
    for path in left_out:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    with unpacked(tmp_path) as upload:
        there = {path.relative_to(upload.folder).as_posix() for path in upload.folder.rglob("*") if path.is_file()}
        assert upload.files == len(there)
        assert upload.bytes < 2.5e6
    needed = {path for path in tracked if path.startswith(("vavae/", "ray_jobs/", "configs/")) and ".png" not in path}
    assert needed <= there
    assert not there & {*left_out}
    assert not [path for path in there if path.startswith(("tests/", "configs/pictures/"))]


def test_the_configuration_must_be_among_what_is_uploaded(tmp_path, monkeypatch):
    folder = tmp_path / "my checkout"
    (folder / "configs").mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert config_inside("configs/a b.yaml", Path()) == "configs/a b.yaml"
    assert config_inside(str(folder / "configs" / "a.yaml"), Path()) == "configs/a.yaml"
    assert config_inside("configs/a.yaml", Path("configs")) == "a.yaml"
    with pytest.raises(UserError, match=r"--config \.\./a.yaml: outside of"):
        config_inside("../a.yaml", Path())


def test_a_relative_root_would_go_with_the_job(capsys):
    assert main(["submit", "pipeline", "--config", "configs/tiny.yaml"]) == 2
    assert "error: storage.root=runs is relative" in capsys.readouterr().err
    assert main(["submit", "tune_vf", "--config", "configs/sweeps/tiny.yaml"]) == 2
    assert "error: run.storage.root=runs is relative" in capsys.readouterr().err


class Scripted:
    """A client of Ray Jobs whose connection breaks as written."""

    def __init__(self, *tails):
        self._tails = list(tails)

    async def tail_job_logs(self, name):
        for text in self._tails.pop(0):
            if isinstance(text, Exception):
                raise text
            yield text

    def get_job_info(self, name):
        return SimpleNamespace(status=JobStatus.RUNNING if self._tails else JobStatus.SUCCEEDED)

    def get_address(self):
        return "http://head"


def test_following_survives_broken_connections_and_repeats_nothing(monkeypatch):
    monkeypatch.setattr(client, "_RETRY_SECONDS", 0)
    broken = RuntimeError("WebSocket connection closed unexpectedly")
    shown = []
    cluster = client.Cluster(
        Scripted(["one\n", "tw", broken], [OSError()], ["one\ntwo\nth"], ["one", "\ntwo\n", "three\n"])
    )
    cluster.follow("job", shown.append)
    assert "".join(shown) == "one\ntwo\nthree\n"
    monkeypatch.setattr(client, "_PATIENCE_SECONDS", -1)
    with pytest.raises(UserError, match=r"job: lost http://head \(WebSocket .*\); vavae logs job --follow"):
        client.Cluster(Scripted([broken])).follow("job", shown.append)


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", None, 130)],
)
def test_who_waits_for_a_job_ends_with_its_status(state, code, expected):
    assert client.exit_status(SimpleNamespace(status=JobStatus(state), driver_exit_code=code)) == expected
