"""`vavae sample` and the lines of the README, on a run of small models."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import load_file, save_file
from support import image_shards
from support.trained_run import trained_run

from vavae.cli.main import main
from vavae.diffusion.config import GuidanceConfig
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.sampling.sample_shards import SampleSet
from vavae.sampling.sampler import Sampler

README = Path(__file__).parents[2] / "README.md"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("runs: a # place"))


@pytest.fixture
def sample(run, tmp_path, monkeypatch):
    """Exit status of ``vavae sample`` with some arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(classes="a,2", seeds="0-2", *words):
        return main(["sample", "--run", run.storage.url(), "--classes", classes, "--seeds", seeds, *words])

    return command


@pytest.fixture(scope="module")
def expected(run):
    """Classes 0 and 2 with seeds 0 to 2, uint8 [6, 3, H, W]."""
    return images(run)


def images(run, guidance=None):
    config = run.config
    return Sampler.load(SamplingInputs.of(run), CPU).images(
        [0, 1, 2] * 2, [0] * 3 + [2] * 3, config.seed, guidance or config.guidance, config.solver
    )


def test_a_picture_has_a_class_a_row_and_a_seed_a_column(sample, expected, tmp_path, capsys):
    assert sample() == 0
    picture = np.asarray(Image.open(tmp_path / "samples.png").convert("RGB"))
    tile = 64
    for place, image in enumerate(expected):
        top, left = place // 3 * (tile + 2), place % 3 * (tile + 2)
        shown = picture[top : top + tile : tile // image_shards.SIZE, left : left + tile : tile // image_shards.SIZE]
        assert np.abs(shown.transpose(2, 0, 1).astype(int) - image.numpy()).max() <= 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == ("samples.png: 2 classes with 3 seeds, euler 2 steps, shift 1, guidance 1.5 for t in [0, 1]")
    assert lines[0].split()[:2] == ["sample", "3/6"]


def test_a_shard_is_webdataset(sample, expected, tmp_path):
    assert sample("0, c", "0, 1-2", "--out", "some.tar") == 0
    records = list(webdataset.WebDataset([str(tmp_path / "some.tar")], shardshuffle=False).decode("rgb8"))
    assert [(record["cls"], record["json"]["seed"]) for record in records] == [
        (label, seed) for label in (0, 2) for seed in (0, 1, 2)
    ]
    pixels = np.stack([record["png"] for record in records]).transpose(0, 3, 1, 2)
    assert np.abs(pixels.astype(int) - expected.numpy()).max() <= 1


def test_an_array_has_an_image_after_the_other(sample, expected, tmp_path):
    assert sample("0,2", "0-2", "--out", str(tmp_path / "below" / "some.npz")) == 0
    with np.load(tmp_path / "below" / "some.npz") as array:
        assert np.abs(array["arr_0"].transpose(0, 3, 1, 2).astype(int) - expected.numpy()).max() <= 1


@pytest.mark.parametrize("words", [["--guidance", "4"], ["guidance.scale=4"], ["guidance.scale=2", "--guidance", "4"]])
def test_guidance_and_every_other_key_can_be_set(sample, run, tmp_path, words):
    assert sample("0,2", "0-2", "--out", "some.npz", *words) == 0
    with np.load(tmp_path / "some.npz") as array:
        found = array["arr_0"].transpose(0, 3, 1, 2).astype(int)
    assert np.abs(found - images(run, GuidanceConfig(scale=4)).numpy()).max() <= 1


def test_seed_and_class_of_an_image_of_the_runs_own_samples_give_that_image(sample, run, tmp_path):
    inputs = SamplingInputs.of(run)
    samples, sampler = SampleSet.of(inputs), Sampler.load(inputs, CPU)
    for shard in samples.shards():
        samples.generate(shard, sampler, lambda _: None)
    index = 7
    assert sample(image_shards.CLASSES[samples.label(index)], str(index), "--out", "one.npz") == 0
    with np.load(tmp_path / "one.npz") as array:
        difference = array["arr_0"].transpose(0, 3, 1, 2).astype(int) - samples.images([index]).numpy()
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["lion", "0"], r"--classes: 'lion' is none of the 3 classes: give a number from 0 to 2 or a name, such as a"),
        (["3", "0"], r"--classes: '3' is none of the 3 classes"),
        (["0,", "0"], r"--classes: '' is none of the 3 classes"),
        (["0", "x"], r"--seeds=x: 'x' is no number and no ascending range, such as 7 or 0-9"),
        (["0", "9-0"], r"--seeds=9-0: '9-0' is no number and no ascending range"),
        (["0", "1,,2"], r"--seeds=1,,2: '' is no number"),
        (["0", "1-"], r"--seeds=1-: '1-' is no number"),
        (["0", "-3"], r"--seeds=-3: '-3' is no number"),
        (["0", "0", "--guidance", "much"], r'guidance.scale \(command line\): "much" should be a valid number'),
        (["0", "0", "guidance.interval=[0.8, 0.2]"], r"interval=\[0.8, 0.2\] must satisfy 0 <= low <= high <= 1"),
        (["0", "0", "solver.rtol=0"], r"solver.rtol \(command line\): 0 should be greater than or equal to 0.000001"),
        (["0", "0", "--out", "some.gif"], r"--out=some.gif: name a file that ends in .png, .tar, .npz"),
        (["0", "0-10000"], r"--out=samples.png: 10,001 images are too many for one picture; take .tar or .npz"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(sample, tmp_path, capsys, words, line):
    assert sample(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(line, error), error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_run_and_a_run_without_a_model_say_so(sample, tmp_path, capsys):
    assert main(["sample", "--run", str(tmp_path), "--classes", "0", "--seeds", "0"]) == 2
    assert "no config.yaml there, so this is not the folder of a run" in capsys.readouterr().err
    other = trained_run(tmp_path / "runs", "other")
    other.storage.delete("lightningdit")
    assert main(["sample", "--run", other.storage.url(), "--classes", "0", "--seeds", "0"]) == 2
    assert "no LightningDiT yet; run python -m ray_jobs.train_lightningdit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("job", "name", "tensor"),
    [
        ("train_lightningdit", "model.safetensors", "x_embedder.proj.weight"),
        ("train_vavae", "model.safetensors", "decoder.conv_out.bias"),
        ("precompute_latents", "statistics.safetensors", "mean"),
        ("precompute_latents", "statistics.safetensors", "std"),
    ],
)
def test_one_nan_in_a_file_is_named_and_no_black_picture_made(tmp_path, monkeypatch, capsys, job, name, tensor):
    run = trained_run(tmp_path / "runs")
    file = run.storage.child(run.prefix(job)).local_file(name)
    tensors = load_file(file)
    tensors[tensor].view(-1)[0] = torch.nan
    save_file(tensors, file)
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    assert main(["sample", "--run", run.storage.url(), "--classes", "0", "--seeds", "0-3"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: \S+{name}: {tensor}\[0.*\] is nan: .+\n", error), error
    assert list(out.iterdir()) == []


def test_a_run_that_was_moved_is_still_one(tmp_path, monkeypatch):
    trained_run(tmp_path / "runs")
    (tmp_path / "runs" / "run").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "--run", "elsewhere/", "--classes", "0", "--seeds", "0"]) == 0
    assert (tmp_path / "samples.png").stat().st_size > 0


def readme_example():
    """The lines of the README that sample from Python."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    (block,) = [block for block in blocks if "Sampler.from_run" in block]
    return block


def test_the_lines_of_the_readme_do_what_it_says(tmp_path, monkeypatch):
    lines = readme_example()
    assert len([line for line in lines.splitlines() if line.strip()]) <= 10
    trained_run(tmp_path / "runs", "quickstart")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(lines, str(README), "exec"), names)
    (picture,) = tmp_path.glob("*.png")
    assert Image.open(picture).width == 10 * (2 * image_shards.SIZE + 2) - 2
    assert names["images"].shape == (10, 3, image_shards.SIZE, image_shards.SIZE)


def test_the_command_of_the_readme_is_understood(tmp_path, monkeypatch):
    (command,) = re.findall(r"^vavae sample (.*)$", README.read_text(), re.M)
    words = command.partition("#")[0].split()
    trained_run(tmp_path / "runs", "quickstart")
    monkeypatch.chdir(tmp_path)
    assert main(["sample", *words]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "samples.png"}
