"""Images of other shapes and formats go through the whole system, from files to the report."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.chain import whole_chain

from vavae.data.image import decode_image
from vavae.data.shard_reader import shard_records
from vavae.data.shards.manifest import read_manifest
from vavae.interop.export import load_exported_lightningdit, load_exported_tokenizer
from vavae.latents.manifest import read_latent_manifest
from vavae.runs.run import Run

pytestmark = pytest.mark.jobs
SHORT = (
    "train_lightningdit.images=128",
    "train_lightningdit.measure=null",
    "train_lightningdit.preview_images=128",
    "sample.images=10",
    "sample.shard_images=10",
    "evaluate.images=32",
)


def first_image(run: Run, job: str, name: str) -> bytes:
    return next(iter(shard_records(run.folder(job).local_file(name))))["png"]


@pytest.mark.parametrize("size", [(48, 32)])
def test_images_that_are_not_square(tmp_path: Path, size: tuple[int, int]) -> None:
    height, width = size
    run = whole_chain(tmp_path, f"shards.image_size=[{height}, {width}]", "evaluate.class_agreement=false", *SHORT)
    assert read_manifest(run.folder("prepare_shards")).image_size == size
    grid = (height // 8, width // 8)
    assert read_latent_manifest(run.folder("precompute_latents")).shape == (4, *grid)
    model, description = load_exported_lightningdit(run.folder("train_lightningdit"))
    assert description.grid == grid
    assert model(torch.zeros(1, 4, *grid), torch.zeros(1), torch.zeros(1, dtype=torch.long)).shape == (1, 4, *grid)
    for job, name in (("prepare_shards", "train/000000.tar"), ("sample", "000000.tar")):
        assert Image.open(io.BytesIO(first_image(run, job, name))).size == (width, height)
    metrics = json.loads(run.storage.read_bytes("metrics.json"))
    assert metrics.keys() >= {"psnr", "ssim", "reconstruction_frechet_distance", "alignment_cosine"}
    assert f"at {height} x {width} px" in run.storage.read_bytes("report.html").decode()


@pytest.mark.parametrize(("channels", "depth", "mode"), [(1, 16, "I;16"), (4, 8, "RGBA")])
def test_images_of_other_channels_and_depths(tmp_path: Path, channels: int, depth: int, mode: str) -> None:
    rng = np.random.default_rng(0)
    dtype = np.uint16 if depth == 16 else np.uint8
    for label in ("low", "high"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(40):
            pixels = rng.integers(2**depth // 2, size=(36, 33, channels)) + (2**depth // 2) * (label == "high")
            picture = Image.fromarray(pixels.astype(dtype)[..., 0] if channels == 1 else pixels.astype(dtype))
            picture.save(tmp_path / "images" / label / f"{index}.png")
    format_ = [f"shards.channels={channels}", f"shards.depth={depth}", f"shards.source={tmp_path / 'images'}"]
    run = whole_chain(tmp_path / "runs", *format_, "sample.npz=true", "evaluate.latent_space=null", *SHORT)
    assert read_manifest(run.folder("prepare_shards")).pixel_format == (channels, depth)
    tokenizer, description = load_exported_tokenizer(run.folder("train_vavae"))
    assert description.tokenizer.image_channels == channels
    assert tokenizer.decode(torch.zeros(1, 4, 4, 4)).shape == (1, channels, 32, 32)
    for job, name in (("prepare_shards", "train/000000.tar"), ("sample", "000000.tar")):
        data = first_image(run, job, name)
        assert Image.open(io.BytesIO(data)).mode == mode
        assert decode_image(data, form=run.config.shards.pixel_format).dtype == dtype
    samples = np.load(io.BytesIO(run.storage.read_bytes("samples.npz")))["arr_0"]
    assert (samples.shape, samples.dtype) == ((10, 32, 32, channels), dtype)
    assert (samples[0] == decode_image(data, form=run.config.shards.pixel_format)).all()
    metrics = json.loads(run.storage.read_bytes("metrics.json"))
    assert metrics.keys() >= {"psnr", "ssim", "reconstruction_frechet_distance", "alignment_cosine", "class_agreement"}
    assert 5 < metrics["psnr"]["value"] < 40
