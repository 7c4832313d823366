"""From a flat folder of images without labels to the report in this process, without Ray."""

import json

import numpy as np
import pytest
import webdataset
from PIL import Image
from support.chain import whole_chain

from ray_jobs.runtime.preflight import preflight
from vavae.cli.main import main
from vavae.config import dump
from vavae.data.shards.manifest import read_manifest
from vavae.errors import UserError
from vavae.interop.export import load_exported_lightningdit
from vavae.latents.manifest import read_latent_manifest
from vavae.randomness import numpy_generator
from vavae.runs.files import CONFIG
from vavae.runs.jobs import JOBS
from vavae.runs.run import Run

pytestmark = pytest.mark.jobs

WITHOUT = ("evaluate.class_agreement=false", "evaluate.latent_space=null")


def write_photographs(folder, count=80):
    """Images of different sizes in one folder, each with a caption."""
    folder.mkdir()
    rows = []
    for index in range(count):
        height, width = numpy_generator(0, "size", index).integers(32, 50, 2)
        pixels = numpy_generator(0, "photograph", index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
        rows.append(json.dumps({"file_name": f"{index:03d}.png", "text": f"a cät {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("unlabeled")
    return whole_chain(root / "runs", f"shards.source={write_photographs(root / 'photographs')}", *WITHOUT)


def test_every_job_is_done_without_classes(run):
    assert [job for job, plan in run.plans().items() if not plan.done] == []
    assert read_manifest(run.storage, run.prefix("prepare_shards")).classes == ()
    assert read_latent_manifest(run.folder("precompute_latents")).classes == ()
    model, description = load_exported_lightningdit(run.stored("train_lightningdit").folder)
    assert (model.null_label, description.lightningdit.classes) == (0, 0)
    metrics = json.loads(run.storage.read_bytes("metrics.json"))
    assert "psnr" in metrics
    assert not [name for name in metrics if "class" in name]


def test_records_have_no_class_and_keep_their_captions(run):
    shards = run.folder("prepare_shards")
    manifest = read_manifest(shards)
    urls = [shards.url(f"train/{shard.name}") for shard in manifest.splits["train"]]
    records = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert {name for record in records for name in record if not name.startswith("__")} == {"png", "json", "txt"}
    texts = [record["txt"].decode() for record in records]
    assert texts == [f"a cät {int(json.loads(record['json'])['key'][:3])}" for record in records]
    latents = run.folder("precompute_latents")
    kept = [
        text
        for shard in read_latent_manifest(latents).splits["train"]
        for text in latents.read_json(f"train/{shard.name.removesuffix('.tar')}.captions.json")
    ]
    assert kept == texts
    files = run.artifact("precompute_latents").files
    assert "train/000000.captions.json" in files


def test_images_are_sampled_without_a_class(run, tmp_path, capsys):
    out = str(tmp_path / "some.png")
    run.storage.write_bytes(CONFIG, dump(run.config).encode())
    command = ["sample", "--run", run.storage.url(), "--seeds", "0-2", "--out", out]
    assert main(command) == 0
    assert f"{out}: 3 images, euler" in capsys.readouterr().out
    assert main([*command, "--classes", "0"]) == 2
    assert "--classes: the images have no classes: leave it out" in capsys.readouterr().err
    assert main([*command, "--guidance", "2"]) == 2
    assert (
        "guidance.scale=2, but the images have no classes to guide to: set guidance.scale=1" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"guidance": {"scale": 2.0}}, r"guidance.scale=2, but the images have no classes to guide to"),
        ({"sample": {"labels": ("cat",)}}, r"sample.labels: the images have no classes: leave it out"),
        (
            {"evaluate": {"class_agreement": True}},
            r"evaluate.class_agreement takes two classes or more, the images have",
        ),
        (
            {"evaluate": {"latent_space": {}}},
            r"evaluate.latent_space takes 92 training images, there are \d\d",
        ),
    ],
)
@pytest.mark.parametrize("done", [True, False])
def test_what_needs_classes_or_more_images_is_refused_before_anything_starts(run, tmp_path, override, message, done):
    config = run.config
    for section, values in override.items():
        changed = type(getattr(config, section)).model_validate({**getattr(config, section).model_dump(), **values})
        config = config.model_copy(update={section: changed})
    if not done:
        config = config.model_copy(update={"name": "other"})
    assert preflight(run, list(JOBS)) == []
    with pytest.raises(UserError, match=message):
        preflight(Run(config), list(JOBS))
