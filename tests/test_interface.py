"""The interface for notebooks: its names, its page of examples, and one sentence for each mistake."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import image_shards, small_models
from support.trained_run import trained_run

import vavae
from vavae.cli.main import main
from vavae.data.pixels import to_float, to_pixels
from vavae.interop.diffusers_tokenizer import save_diffusers_tokenizer
from vavae.interop.released_lightningdit import save_released_lightningdit
from vavae.interop.released_tokenizer import save_released_tokenizer
from vavae.latents.pictures import posterior_noise
from vavae.models.dit.model import LightningDiT

PACKAGE = Path(vavae.__file__).parent
RELEASED_TOKENIZER, DIFFUSERS = "vavae-imagenet256-f16d32-dinov2.pt", "sd-vae-ft-ema"
RELEASED_LIGHTNINGDIT = "lightningdit-xl-imagenet256-64ep.pt"
SIZE, DIM, GRID = image_shards.SIZE, small_models.TOKENIZER.latent_dim, small_models.GRID

CELLS = """
import asyncio, sys

sys.modules["ray"] = sys.modules["deepspeed"] = None  # what stands there can't be imported

async def run(code):
    exec(code, {})

asyncio.run(run(compile(sys.stdin.read(), "README.md", "exec")))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run, a photo and released files, as the page finds it."""
    folder = tmp_path_factory.mktemp("notebook")
    trained_run(folder / "runs", "quickstart")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    tokenizer = small_models.tokenizer()
    save_released_tokenizer(folder / RELEASED_TOKENIZER, tokenizer)
    save_diffusers_tokenizer(str(folder / DIFFUSERS), tokenizer, SIZE)
    save_released_lightningdit(folder / RELEASED_LIGHTNINGDIT, LightningDiT(small_models.LIGHTNINGDIT, DIM, GRID))
    return folder


@pytest.fixture
def place(folder, monkeypatch):
    """The same, as the working folder."""
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def sampler(folder):
    return vavae.Sampler.from_run(folder / "runs" / "quickstart")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return vavae.load_tokenizer(folder / "runs" / "quickstart")


def pixels_of(count, seed=1):
    """Pixels uint8 [N, H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def test_the_names_are_declared_for_the_type_checker_and_found_where_the_table_says():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {alias.name: node.module for node in block.body for alias in node.names}
    assert declared == vavae._MODULES
    assert sorted(declared) == vavae.__all__ == dir(vavae)
    for name, module in declared.items():
        found = getattr(vavae, name)
        assert found.__module__ == module
        assert len(found.__doc__) > 50
    with pytest.raises(AttributeError, match="module 'vavae' has no attribute 'Sampel'"):
        vavae.Sampel  # noqa: B018  it is the access that is tested


def test_the_page_runs_in_the_event_loop_of_a_notebook_without_ray_and_deepspeed(folder):
    cells = re.findall(r"^```python\n(.*?)^```$", (PACKAGE / "README.md").read_text(), re.M | re.S)
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", CELLS],
        input="\n".join(cells),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("<Sampler: run quickstart, 8 x 8 pixels, 3 classes, euler 2 steps")
    assert f"Run.at('{folder}/runs/quickstart') 2.0 (4, 4, 4)" in lines
    assert lines[-1].startswith("classes: 'cat' is none of the 3 classes: give a number from 0 to 2")
    widths = {path.name: Image.open(path).width for path in folder.glob("*.png")}
    assert widths == {
        "samples.png": 8 * (2 * SIZE + 2) - 2,
        "restored.png": 4 * 32,
        "between.png": 8 * (2 * 32 + 2) - 2,
    }


def test_all_addresses_of_a_model_give_the_same(place):
    expected = small_models.tokenizer().state_dict()
    run = vavae.Run.at("runs/quickstart")
    for source in ("runs/quickstart/", run, "runs/quickstart/tokenizer/export", RELEASED_TOKENIZER, DIFFUSERS):
        found = vavae.load_tokenizer(source)
        assert not found.training
        assert not any(each.requires_grad for each in found.parameters())
        assert all(tensor.equal(expected[name]) for name, tensor in found.state_dict().items())
    expected = small_models.lightningdit().state_dict()
    for source in ("runs/quickstart", run, place / "runs" / "quickstart" / "lightningdit" / "export"):
        found = vavae.load_lightningdit(source)
        assert not found.training
        assert all(tensor.equal(expected[name]) for name, tensor in found.state_dict().items())
    assert vavae.load_lightningdit(RELEASED_LIGHTNINGDIT, weights="ema").config == small_models.LIGHTNINGDIT


def test_a_picture_is_the_same_in_every_form(tokenizer):
    pixels = pixels_of(3)
    tensor = torch.from_numpy(pixels).movedim(-1, 1)
    latents = vavae.encode(tokenizer, pixels)
    assert latents.equal(tokenizer.encode(to_float(tensor)).mean)
    assert not latents.is_inference(), "a notebook may differentiate by it"
    pictures = [Image.fromarray(each) for each in pixels]
    for images in (pictures, [each.convert("RGBA") for each in pictures], tensor, to_float(tensor), pixels[:, :, ::1]):
        assert vavae.encode(tokenizer, images).equal(latents)
    alone = vavae.encode(tokenizer, pictures[1])
    torch.testing.assert_close(alone, latents[1:2])
    turned = pictures[0].copy()
    turned.getexif()[0x0112] = 3  # orientation: upside down
    torch.testing.assert_close(vavae.encode(tokenizer, turned), vavae.encode(tokenizer, pictures[0].rotate(180)))


def test_a_seed_draws_from_the_posterior_of_each_image_whatever_the_batch(tokenizer):
    images = torch.from_numpy(pixels_of(3)).movedim(-1, 1)
    posterior = tokenizer.encode(to_float(images))
    expected = posterior.mean + posterior.std * posterior_noise(posterior.mean.shape, 5, 0)
    for batch_size in (1, 2, 16):
        torch.testing.assert_close(vavae.encode(tokenizer, images, seed=5, batch_size=batch_size), expected)


def test_decoding_gives_pixels(tokenizer):
    latents = torch.randn(3, DIM, 2, 6)
    images = vavae.decode(tokenizer, latents, batch_size=2)
    assert (images.dtype, images.shape) == (torch.uint8, (3, 3, 4, 12))
    assert (images.int() - to_pixels(tokenizer.decode(latents)).int()).abs().max() <= 1


def test_samples_are_those_of_the_command(sampler, place):
    images = sampler.sample(["a", 2], range(3))
    words = ["--classes", "a,2", "--seeds", "0-2", "--out", "command.npz", "--guidance", "4"]
    assert main(["sample", "--run", "runs/quickstart", *words]) == 0
    with np.load("command.npz") as array:
        expected = array["arr_0"].transpose(0, 3, 1, 2).astype(int)
    assert np.abs(sampler.with_overrides(["guidance.scale=4"]).sample(["a", 2], range(3)).numpy() - expected).max() <= 1
    assert np.abs(images.numpy() - expected).max() > 1
    assert (sampler.sample("c", 1).int() - images[4:5].int()).abs().max() <= 1
    other = vavae.Sampler.from_run(vavae.Run.at("runs/quickstart"), ["guidance.scale=4", "solver.num_steps=3"])
    assert other.config.guidance.scale == 4
    again = sampler.with_overrides(["guidance.scale=4", "solver.num_steps=3"])
    assert other.sample([1], [7]).equal(again.sample([1], [7]))


def test_objects_say_in_one_line_what_they_are(sampler, folder):
    words = "run quickstart, 8 x 8 pixels, 3 classes, euler 2 steps, shift 1, guidance 1.5 for t in [0, 1], on cpu"
    assert repr(sampler) == f"<Sampler: {words}>"
    assert repr(vavae.Sampler(sampler.tokenizer, sampler.lightningdit, sampler.normalizer)) == (
        "<Sampler: 8 x 8 pixels, on cpu>"
    )
    run = vavae.Run.at(folder / "runs" / "quickstart")
    assert repr(run) == repr(run.snapshot()) == f"Run.at('{folder}/runs/quickstart')"


BATCH = torch.zeros(2, 3, SIZE, SIZE)
LATENTS, TIMES, LABELS = torch.zeros(2, DIM, GRID, GRID), torch.zeros(2), torch.zeros(2, dtype=torch.int64)


@pytest.fixture(scope="module")
def objects(folder, sampler, tokenizer):
    return {
        "vavae": vavae,
        "torch": torch,
        "np": np,
        "sampler": sampler,
        "tokenizer": tokenizer,
        "model": vavae.load_lightningdit(folder / "runs" / "quickstart"),
        "photo": Image.open(folder / "photo.jpg"),
        **{name: value for name, value in globals().items() if name.isupper()},
    }


@pytest.mark.parametrize(
    ("cell", "line"),
    [
        (
            "vavae.Sampler.from_run('runs/quikstart')",
            r"runs/quikstart: no config.yaml there, so this is not",
        ),
        ("vavae.load_tokenizer('nothing')", r"/nothing: no such file or folder: give a run, an export, or a released"),
        ("vavae.load_tokenizer('runs')", r"/runs: no config.yaml and no model.yaml there: give a run, an export"),
        ("vavae.load_tokenizer('photo.jpg')", r"photo.jpg: a file of weights ends in .pt"),
        ("vavae.load_tokenizer('hf-hub:nobody')", r"hf-hub:nobody: write hf-hub:owner/name"),
        ("vavae.load_tokenizer(RELEASED_LIGHTNINGDIT)", r"no tensor .*, which every tokenizer has; .* a LightningDiT"),
        ("vavae.load_tokenizer('runs/quickstart/lightningdit/export')", r"not the description of such a model"),
        ("vavae.load_lightningdit('sd-vae-ft-ema')", r"/sd-vae-ft-ema: no config.yaml and .* of a LightningDiT"),
        ("vavae.load_lightningdit('runs/quickstart', 'wide')", r"no average of weights wide; there are: none"),
        ("vavae.load_lightningdit('runs/quickstart', 'model')", r"weights=model: no checkpoint in .*/lightningdit/"),
        (
            "vavae.load_lightningdit(RELEASED_LIGHTNINGDIT, 'model')",
            r"a mapping of ema, expected .* under model",
        ),
        ("vavae.load_lightningdit('runs/quickstart/lightningdit/export', 'ema')", r"weights=ema: an export holds one"),
        ("vavae.load_tokenizer('runs/quickstart', 'gpu')", r"device=gpu: no such device here \(.*\): leave it out, or"),
        ("vavae.load_lightningdit('runs/quickstart', device='cuda:99')", r"device=cuda:99: no such device here"),
        ("vavae.Sampler.from_run('runs/quickstart', device='cuda:99')", r"device=cuda:99: no such device here"),
        ("vavae.Sampler.from_run('runs/quickstart', ['guidance.scal=2'])", r"guidance.scal .*scale"),
        ("sampler.sample()", r"classes is missing: name some of the 3, such as a"),
        ("sampler.sample('lion')", r"classes: 'lion' is none of the 3 classes"),
        ("sampler.sample([0, 3])", r"classes: '3' is none of the 3 classes"),
        ("sampler.sample(-1)", r"classes: '-1' is none of the 3 classes"),
        ("sampler.sample([0], [])", r"classes=\[0\], seeds=\[\]: this asks for no image"),
        ("sampler.sample([0], [0.5])", r"seeds=\[0.5\]: expected whole numbers from 0 on"),
        ("sampler.sample([0], '0-9')", r"seeds=0-9: expected whole numbers from 0 on"),
        ("sampler.sample([0], -1)", r"seeds=-1: expected whole numbers from 0 on"),
        ("sampler.with_overrides(['sample.weights=wide'])", r"sample.weights says what a sampler loads: give it to"),
        ("sampler.with_overrides(['guidance.scale=much'])", r"guidance.scale .*should be a valid number"),
        ("vavae.Sampler(tokenizer, model, None).with_overrides([])", r"put together without a run: take Sampler.from_"),
        ("vavae.encode(sampler, BATCH)", r"tokenizer: a Sampler, expected what load_tokenizer returns, before images"),
        ("vavae.encode(tokenizer, 'photo.jpg')", r"images: a str, expected pictures of Pillow, an array uint8"),
        ("vavae.encode(tokenizer, [])", r"images: shape \[0, .*\], expected pictures"),
        ("vavae.encode(tokenizer, BATCH[0])", r"images: shape \[3, 8, 8\], expected pictures"),
        ("vavae.encode(tokenizer, BATCH.movedim(1, -1))", r"images: shape \[2, 8, 8, 3\], expected pictures"),
        ("vavae.encode(tokenizer, np.zeros((2, 3, 8, 8), np.uint8))", r"images: shape \[2, 3, 8, 8\], expected"),
        ("vavae.encode(tokenizer, np.zeros((2, 8, 8, 3)))", r"images: an array of float64, expected"),
        ("vavae.encode(tokenizer, BATCH.long())", r"images: a tensor of torch.int64, expected"),
        (
            "vavae.encode(tokenizer, BATCH[..., :7])",
            r"images: 8 x 7 pixels, expected multiples of 2, .* crop or",
        ),
        ("vavae.encode(tokenizer, [photo, photo.resize((8, 8))])", r"images: 8 x 8 and 40 x 48 pixels: crop or resize"),
        ("vavae.encode(tokenizer, photo.convert('F'))", r"images: floating-point pixels have no agreed range: convert"),
        ("vavae.encode(tokenizer, BATCH + 255)", r"floating-point values from 255 to 255, .* / 127.5 - 1"),
        ("vavae.encode(tokenizer, BATCH * torch.nan)", r"floating-point values from nan to nan, expected \[-1, 1\]"),
        ("vavae.decode(tokenizer, BATCH)", r"latents: shape \[2, 3, 8, 8\], expected \[N, 4, h, w\]"),
        ("vavae.decode(tokenizer, LATENTS.long())", r"latents: torch.int64, expected a floating-point tensor"),
        ("vavae.decode(tokenizer, [0.5])", r"latents: a list, expected a floating-point tensor \[N, 4, h, w\]"),
        ("vavae.decode(tokenizer, LATENTS / 0)", r"decode: latents\[0, 0, 0, 0\] is nan .*: give latents that are"),
        ("model(BATCH, TIMES, LABELS)", r"x: torch.float32 \[2, 3, 8, 8\], expected floating-point \[B, 4, 4, 4\]"),
        ("model(LATENTS, 0.5, LABELS)", r"t: a float, expected a tensor floating-point \[2\], one for each of x"),
        ("model(LATENTS, t=TIMES[:1], y=LABELS)", r"t: torch.float32 \[1\], expected floating-point \[2\]"),
        ("model(LATENTS, TIMES, TIMES)", r"y: torch.float32 \[2\], expected int64 \[2\], one for each of x"),
        ("model(LATENTS, TIMES, LABELS + 4)", r"y: labels from 4 to 4, expected 0 to 3, which is no class"),
        ("model(LATENTS.to('meta'), TIMES, LABELS)", r"x: on meta, but the LightningDiT is on cpu: move it there"),
    ],
)
def test_a_mistake_is_one_sentence(objects, place, cell, line):
    with pytest.raises(vavae.UserError) as raised:
        eval(cell, objects)
    (text,) = str(raised.value).splitlines()
    assert re.search(line, text), text
