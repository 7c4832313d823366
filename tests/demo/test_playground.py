"""Pictures, captions and commands that the page of a run shows, without the page."""

import io
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from support import image_shards, small_models
from support.trained_run import trained_run

from vavae.cli.main import main
from vavae.data.image import center_crop_resize
from vavae.data.pixels import to_pixels
from vavae.demo.playground import Playground
from vavae.errors import UserError
from vavae.latents.pictures import encode
from vavae.metrics.reconstruction import psnr
from vavae.models.dit.config import IntermediateHeadConfig

SIZE = image_shards.SIZE


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def playground(run):
    return Playground.at(run.storage.url(), ["guidance.scale=2"], "cpu")


def pixels_of(pictures):
    """Pixels uint8 [N, H, W, 3]."""
    return np.stack([np.asarray(picture) for picture, _ in pictures])


def png(pixels, mode=None, **settings):
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "png", **settings)
    return buffer.getvalue()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_samples_are_those_of_the_command_bit_for_bit(playground, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = ["a", "c"], 3, 2, ["solver.num_steps=3", " solver.name=heun  guidance.interval=[0.1, 1]\n", " "]
    pictures = playground.sample(*wanted)
    assert [caption for _, caption in pictures] == ["a, seed 3", "a, seed 4", "c, seed 3", "c, seed 4"]
    words = shlex.split(playground.command(*wanted))
    assert words[:2] == ["vavae", "sample"]
    assert main([*words[1:], "--out", "samples.npz"]) == 0
    with np.load("samples.npz") as array:
        np.testing.assert_array_equal(pixels_of(pictures), array["arr_0"])
    assert not (pixels_of(playground.sample(*wanted[:3], [])) == pixels_of(pictures)).all()


def test_a_walk_goes_from_one_seeds_sample_to_the_others(playground):
    pictures = playground.walk("b", 3, 7, 5, ["solver.num_steps=3"])
    assert [caption for _, caption in pictures] == ["seed 3", "25%", "50%", "75%", "seed 7"]
    shown = pixels_of(pictures).astype(int)
    ends = pixels_of([*playground.sample(["b"], 3, 1, ["solver.num_steps=3"]), *playground.sample(["b"], 7, 1, [])])
    assert np.abs(shown[0] - ends[0]).max() <= 1
    assert np.abs(shown[-1] - pixels_of(playground.sample(["b"], 7, 1, ["solver.num_steps=3"]))[0]).max() <= 1
    assert len({each.tobytes() for each in shown}) == 5


def test_sliders_are_those_of_what_the_models_have(playground, tmp_path):
    assert [(each.key, each.value) for each in playground.sliders] == [("guidance.scale", 2), ("solver.num_steps", 2)]
    assert playground.solvers == ["euler", "heun"]
    unlabeled = small_models.LIGHTNINGDIT.model_copy(
        update={"classes": 0, "depth": 2, "intermediate_head": IntermediateHeadConfig(after_block=1)}
    )
    run = trained_run(tmp_path, lightningdit=unlabeled, guidance={"internal_scale": 5}, solver={"name": "dopri5"})
    other = Playground.at(run.storage.url())
    found = [(each.key, each.value, each.high) for each in other.sliders]
    assert found == [("guidance.internal_scale", 5, 10), ("solver.num_steps", 250, 250)]
    assert other.solvers == ["dopri5", "euler", "heun"]
    pictures = other.sample(None, 0, 2, ["solver.name=euler", "solver.num_steps=2"])
    assert [caption for _, caption in pictures] == ["seed 0", "seed 1"]
    assert "--classes" not in other.command(None, 0, 1, [])


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(noise(37, 90, 3)),
        Image.fromarray(noise(3, 5, 3)),
        Image.fromarray(noise(40, 30, 4)),
        Image.fromarray(noise(31, 40)),
        Image.fromarray(noise(20, 20)).convert("P"),
        Image.fromarray(noise(20, 30).astype(np.uint16) * 257),
        Image.fromarray(noise(20, 30)).convert("1"),
    ],
    ids=["odd", "small", "alpha", "gray", "palette", "16 bits", "1 bit"],
)
def test_any_picture_is_reconstructed(playground, picture):
    buffer = io.BytesIO()
    picture.getexif()[0x0112] = 6  # orientation: a quarter to the left
    picture.save(buffer, "png", exif=picture.getexif())
    pictures, words = playground.reconstruct(buffer.getvalue())
    shown = pixels_of(pictures).astype(int)
    assert shown.shape == (3, SIZE, SIZE, 3)
    if picture.mode in ("RGB", "RGBA"):
        upright = picture.convert("RGB").rotate(-90, expand=True)
        np.testing.assert_array_equal(shown[0], center_crop_resize(upright, (SIZE, SIZE)))
    np.testing.assert_array_equal(shown[2], np.minimum(255, 4 * np.abs(shown[0] - shown[1])))
    original, restored = torch.from_numpy(shown[:2].astype(np.uint8)).movedim(-1, 1).split(1)
    expected = to_pixels(playground.tokenizer.decode(encode(playground.tokenizer, original)))
    assert (restored.int() - expected.int()).abs().max() <= 1
    decibels = psnr(restored, original).item()
    assert words == f"PSNR {decibels:.2f} dB, 3 x {SIZE} x {SIZE} pixels through 4 x 4 x 4 latents"


def test_mistakes_are_one_line(playground, run, tmp_path):
    for call, line in (
        (lambda: playground.reconstruct(b"GIF89a"), "this file can't be read as a picture: .*"),
        (lambda: playground.sample(["d"], 0, 1, []), "classes: 'd' is none of the 3 classes.*"),
        (lambda: playground.sample([], 0, 1, []), "classes=.*this asks for no image.*"),
        (lambda: playground.sample(["a"], 0, 1, ["solver.steps=3"]), "solver.steps .*no such key.*"),
        (lambda: playground.sample(["a"], 0, 1, ["sample.weights=x"]), "sample.weights says what a sampler loads.*"),
        (lambda: playground.walk("a", 0, -1, 3, []), "seeds=.* expected whole numbers from 0 on"),
        (lambda: playground.walk(None, 0, 1, 3, []), "label is missing: name some of the 3, such as a"),
    ):
        with pytest.raises(UserError) as raised:
            call()
        assert re.fullmatch(line, str(raised.value)), raised.value


def test_a_run_with_a_tokenizer_alone_and_one_with_nothing(tmp_path):
    run = trained_run(tmp_path)
    run.storage.child(run.prefix("train_lightningdit")).delete("artefact.json")
    playground = Playground.at(run.storage.url())
    assert playground.sampler is None
    assert len(playground.reconstruct(png(noise(9, 9)))[0]) == 3
    assert "<h1>run</h1>" in playground.report()
    run.storage.child(run.prefix("train_vavae")).delete("artefact.json")
    with pytest.raises(UserError, match=r"no tokenizer yet; run python -m ray_jobs\.train_vavae"):
        Playground.at(run.storage.url())


def test_without_gradio_the_command_names_its_extra(run, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo", run.storage.url()]) == 2
    assert capsys.readouterr().err.strip().endswith("gradio, which is not installed: pip install -e '.[demo]'")
