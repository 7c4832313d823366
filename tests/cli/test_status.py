"""How far a run is, from its storage: without its images, its cluster or its processes."""

import json
import re
import shutil
from datetime import datetime, timedelta, timezone

import pytest
import yaml
from PIL import Image

from vavae.cli.main import main
from vavae.config import dump, load
from vavae.data.shards.write import write_shards
from vavae.report.run_status import run_cost, run_status
from vavae.runs.config import RunConfig
from vavae.runs.files import CONFIG
from vavae.runs.run import Run
from vavae.storage.artifact import RECORD, Artifact, commit
from vavae.training.hardware import HARDWARE, Hardware

RATES = (20.0, 40.0, 10.0)
"""Images per second of three rows of 40 images."""


@pytest.fixture(params=["folder", "store"])
def run(request, tmp_path):
    """A run in the middle of the tokenizer's training, whose images are on another machine."""
    images = tmp_path / "images"
    for name in ("cat", "dog"):
        (images / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(images / name / "0.png")
    training = {"images": 400, "batch_size": 8}
    document = {
        "name": "far",
        "storage": {"root": str(tmp_path / "all runs") if request.param == "folder" else f"memory://{tmp_path.name}"},
        "shards": {"source": str(images), "image_size": 8, "validation_fraction": 0},
        "stream": {"lanes": 2},
        "tokenizer": {"channels": 32, "channel_multipliers": [1, 1], "attention_levels": []},
        "lightningdit": {"size": None, "depth": 1, "width": 32, "heads": 2},
        "train_vavae": training,
        "train_lightningdit": training,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    run = Run(load(RunConfig, tmp_path / "run.yaml"))
    write_shards(run.storage, run.prefix("prepare_shards"), run.config.shards, lambda done, total: None)
    run.storage.write_bytes(CONFIG, dump(run.config).encode())
    run.claim("train_vavae")
    folder = run.storage.child(run.training_prefix("train_vavae"))
    for number, rate in enumerate(RATES, 1):
        row = {"stage": "train_vavae", "images": 40 * number, "images_per_second": rate}
        folder.write_bytes(f"log/{40 * number:012d}.jsonl", (json.dumps(row) + "\n").encode())
    for seen in (40, 80):
        record = Artifact(kind="checkpoint", digest="", config="", images_seen=seen)
        commit(folder, f"checkpoints/{seen:012d}", record)
    hardware = Hardware(workers=2, device="CPU", threads=1, torch="2")
    folder.write_json(HARDWARE, hardware.model_dump())
    folder.write_bytes("checkpoints/lease.json", b"{}")
    folder.write_bytes("checkpoints/000000000120/generator/00000.safetensors", b"not committed yet")
    shutil.rmtree(images)
    return run


def lines_of(run):
    newest = f"{run.training_prefix('train_vavae')}/checkpoints/{80:012d}/{RECORD}"
    now = run.storage.modified(newest) + timedelta(seconds=5)
    return [stage.line(now) for stage in run_status(run, run.plans(sources=False))]


def test_a_run_is_found_by_its_folder_alone(run):
    found = Run.at(run.storage.url())
    assert found.config.model_copy(update={"storage": run.config.storage}) == run.config
    shards, tokenizer, latents, *_ = lines_of(found)
    assert re.fullmatch(r"prepare_shards     done   [0-9a-f]{12}", shards)
    assert re.fullmatch(r"train_vavae        80/400 images  10 images/s  0:32 left  saved 0:05 ago", tokenizer)
    assert latents == "precompute_latents to do  after tokenizer"


def test_a_finished_training_shows_what_it_made(run):
    run.storage.write_bytes("tokenizer/export/model", b"")
    run.output("train_vavae").commit("ab" * 32, {}, images_seen=400)
    assert lines_of(run)[1:3] == ["train_vavae        done   abababababab", "precompute_latents to do  not there yet"]
    run.storage.write_bytes(f"{run.prefix('precompute_latents')}/train/000000.tar", b"")
    assert lines_of(run)[2] == "precompute_latents to do  not there yet  shards so far: 1"


def test_the_cost_is_that_of_the_steps_that_are_kept(run):
    assert run_cost(run, 3600.0) == 2 * sum(40 / rate for rate in RATES) == 14.0


def test_the_time_of_a_file(run):
    age = datetime.now(timezone.utc) - run.storage.modified(CONFIG)
    assert timedelta(seconds=-1) < age < timedelta(seconds=60)


def test_the_command(run, capsys):
    if not run.storage.is_local:
        pytest.skip("a store in memory is this process' own")
    assert main(["status", run.storage.url(), "--hourly-price", "1800"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "cost so far: 7.00 at 1800 per worker and hour"
    assert main(["status", run.storage.url(), "workers.hourly_price=3600"]) == 0
    assert "cost so far: 14.00" in capsys.readouterr().out
    assert main(["status"]) == 2
    assert "name the run" in capsys.readouterr().err
