"""Relative paths of a configuration: opened from everywhere, stored as they were written."""

import pickle
from pathlib import Path

import pytest

from vavae.config import LocalPath, digest, dump, load, resolve_paths, written_path
from vavae.config.paths import ResolvedPath
from vavae.runs.config import RunConfig
from vavae.runs.run import Run

_BASE = Path(__file__).parents[2] / "configs" / "tiny.yaml"
_RELATIVE = {
    "storage.root": "runs",
    "storage.cache": "cache",
    "storage.ca_bundle": "keys/ca.pem",
    "shards.source": "images.zip#train",
    "shards.validation_source": "indexed:held-out",
    "shards.labels": "labels.csv",
    "shards.validation_labels": "labels.csv",
    "teacher.weights": "teacher.safetensors",
    "losses.perceptual.weights": "../vgg16.pth",
    "train_vavae.start_from": "mine/tokenizer/export",
    "evaluate.reference": "reference.npz",
    "evaluate.metrics.dinov2_weights": "dino.pth",
    "evaluate.metrics.weights.mae_large": "mae.safetensors",
    "evaluate.metrics.inception.weights": "inception.pth",
}
_STAY = {
    "storage.root": "s3://bucket/runs",
    "storage.cache": "~/.cache/vavae",
    "shards.source": "huggingface:cifar10#train",
    "shards.validation_source": "/data/images",
    "teacher.weights": "hf-hub:owner/model@main",
    "evaluate.reference": "train",
}


def _config(values: dict[str, str]) -> RunConfig:
    return load(RunConfig, _BASE, ["losses.perceptual.kind=lpips", *(f"{key}={text}" for key, text in values.items())])


def _value(config: object, path: str) -> str:
    for name in path.split("."):
        config = getattr(config, name)
    assert isinstance(config, str)
    return config


@pytest.mark.parametrize("path", _RELATIVE)
def test_a_relative_path_is_opened_in_the_folder_of_the_command_and_stored_as_written(path: str):
    written, resolved = _config(_RELATIVE), resolve_paths(_config(_RELATIVE), "/somewhere/below")
    text = _RELATIVE[path]
    prefix = "indexed:" if text.startswith("indexed:") else ""
    folder, name = ("/somewhere", text.removeprefix("../")) if "../" in text else ("/somewhere/below", text)
    assert _value(resolved, path) == f"{prefix}{folder}/{name.removeprefix(prefix)}"
    assert written_path(_value(resolved, path)) == text
    assert (digest(resolved), dump(resolved)) == (digest(written), dump(written))
    assert resolve_paths(resolved, "/elsewhere") is resolved


def test_what_is_no_relative_path_stays():
    config = _config(_STAY)
    assert resolve_paths(config, "/somewhere") is config
    assert LocalPath().resolve("", "/somewhere") == ""


def test_a_path_stays_resolved_on_its_way_to_another_process_and_section():
    config = pickle.loads(pickle.dumps(resolve_paths(_config(_RELATIVE), "/somewhere")))
    weights = config.teacher.backbone.weights
    assert isinstance(weights, ResolvedPath)
    assert (weights, weights.written) == ("/somewhere/teacher.safetensors", "teacher.safetensors")
    assert digest(config.teacher.backbone) == digest(_config(_RELATIVE).teacher.backbone)
    assert digest(config.evaluate.metrics.fingerprint()) == digest(_config(_RELATIVE).evaluate.metrics.fingerprint())


def test_a_run_stays_where_its_command_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run = Run(_config({"shards.source": "images"}))
    monkeypatch.chdir("elsewhere")
    assert run.config.shards.source == str(tmp_path / "images")
    assert Run(run.config).storage.url() == str(tmp_path / "runs" / "tiny")
