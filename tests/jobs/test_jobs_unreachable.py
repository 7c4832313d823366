"""A store that nobody answers for: one line before anything starts."""

import socket

import pytest

from ray_jobs import pipeline
from ray_jobs.runtime import command


def test_a_store_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    arguments = ["--config", "configs/tiny.yaml", "storage.root=s3://nowhere/runs", f"storage.endpoint={endpoint}"]
    assert command.pipeline("test", pipeline.JOB_FUNCTIONS, [*arguments, "storage.attempts=2"]) == 2
    error = capfd.readouterr().err
    assert error.startswith(
        "error: storage.root=s3://nowhere/runs: s3://nowhere/runs/tiny/shards/artefact.json: gave up"
    )
    assert error.endswith("check it and storage.endpoint\n")
    assert error.count("\n") == 1
    assert "secret" not in error
