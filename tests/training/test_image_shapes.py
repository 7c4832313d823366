"""Images that are not square go through the whole system, from digits to the report."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.chain import whole_chain

from vavae.data.shard_reader import shard_records
from vavae.data.shards.manifest import read_manifest
from vavae.interop.export import load_lightningdit
from vavae.latents.manifest import read_latent_manifest

pytestmark = pytest.mark.jobs


@pytest.mark.parametrize("size", [(32, 64), (48, 32)])
def test_every_stage_takes_them(tmp_path: Path, size: tuple[int, int]) -> None:
    height, width = size
    run = whole_chain(
        tmp_path,
        f"shards.image_size=[{height}, {width}]",
        "train_lightningdit.images=128",
        "train_lightningdit.measure=null",
        "train_lightningdit.preview_images=128",
        "sample.images=10",
        "sample.shard_images=10",
        "evaluate.images=32",
        "evaluate.class_agreement=false",
    )
    shards = run.folder("prepare_shards")
    manifest = read_manifest(shards)
    assert manifest.image_size == size
    record = next(iter(shard_records(shards.local_file("train/000000.tar"))))
    assert np.asarray(Image.open(io.BytesIO(record["png"]))).shape[:2] == size
    grid = (height // 8, width // 8)
    assert read_latent_manifest(run.folder("precompute_latents")).shape == (4, *grid)
    model, description = load_lightningdit(run.folder("train_lightningdit"))
    assert description.grid == grid
    assert model(torch.zeros(1, 4, *grid), torch.zeros(1), torch.zeros(1, dtype=torch.long)).shape == (1, 4, *grid)
    sample = next(iter(shard_records(run.folder("sample").local_file("000000.tar"))))
    assert Image.open(io.BytesIO(sample["png"])).size == (width, height)
    metrics = json.loads(run.storage.read_bytes("metrics.json"))
    assert metrics.keys() >= {"psnr", "ssim", "reconstruction_frechet_distance", "alignment_cosine"}
    assert f"at {height} x {width} px" in run.storage.read_bytes("report.html").decode()
