"""A run as a pipeline folder: what diffusers samples with it where vavae is not installed, and what it can't say."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import small_models
from support.trained_run import trained_run

from vavae.cli.main import main
from vavae.errors import UserError
from vavae.interop.diffusers_lightningdit import save_diffusers_lightningdit
from vavae.interop.diffusers_pipeline import save_diffusers_pipeline
from vavae.models.dit.config import LightningDiTConfig, RoutingConfig
from vavae.models.dit.model import LightningDiT
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.sampling.sampler import Sampler, noise_of

pytest.importorskip("diffusers")

LABELS, SEED = [0, 1, 2, 1], 7
DIT = small_models.LIGHTNINGDIT.model_copy(
    update={"patch_size": 2, "qk_norm": False, "mlp": "gelu", "norm": "layernorm", "rope": False, "shift": False}
)
MODELS = {
    "published": small_models.LIGHTNINGDIT,
    "dit": DIT,
    "data": small_models.LIGHTNINGDIT.model_copy(update={"prediction": "data"}),
    "unlabeled": small_models.LIGHTNINGDIT.model_copy(update={"classes": 0}),
    "routed": small_models.LIGHTNINGDIT.model_copy(update={"routing": RoutingConfig(first_block=0, last_block=0)}),
}
GUIDED = ["guidance.scale=4", "guidance.channels=3", "guidance.interval=[0.1,0.7]"]
CASES = {
    # A bound that is a time of the grid, in float32.
    "interval and channels": ("published", [*GUIDED, "solver.num_steps=10"]),
    "shift": ("published", ["guidance.scale=3", "solver.shift=0.3", "solver.num_steps=5"]),
    "heun": ("dit", [*GUIDED, "solver={name: heun, num_steps: 3, shift: by_dimension}"]),
    "data": ("data", ["guidance.scale=2", "solver={name: heun, num_steps: 3}"]),
    "unguided": ("dit", ["guidance.scale=1"]),
    "unlabeled": ("unlabeled", ["guidance.scale=1"]),
    "routed": ("routed", ["guidance.scale=2"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {name: trained_run(root, name, model) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def inputs(runs):
    """Inputs of sampling by case."""
    return {case: SamplingInputs.at(runs[name].storage.url(), changes) for case, (name, changes) in CASES.items()}


def labels_of(inputs):
    return [0] * len(LABELS) if inputs.config.lightningdit.classes == 0 else LABELS


@pytest.fixture(scope="module")
def sampled(inputs, tmp_path_factory):
    """Images of each case, and further ones, as diffusers makes them in another process, float [B, 3, H, W]."""
    folder = tmp_path_factory.mktemp("pipelines")
    requests = {}
    for case, each in inputs.items():
        save_diffusers_pipeline(each, str(folder / case))
        labels = {"class_labels": LABELS} if each.config.lightningdit.classes else {"batch_size": len(LABELS)}
        requests[case] = {"pipeline": str(folder / case), "arguments": labels}
    first, heun = str(folder / "interval and channels"), str(folder / "heun")
    asked = {"guidance_scale": 3, "guidance_interval": [0, 1], "guidance_channels": 4, "num_inference_steps": 5}
    requests |= {
        "saved": {"pipeline": heun, "save": str(folder / "saved"), "arguments": {"class_labels": LABELS}},
        "names": {"pipeline": first, "compare": True, "arguments": {"class_labels": ["a", "b", "c", "b"]}},
        "asked": {"pipeline": str(folder / "shift"), "arguments": {"class_labels": LABELS, **asked}},
        "bfloat16": {"pipeline": first, "dtype": "bfloat16", "arguments": {"class_labels": LABELS}},
        "seed": {"pipeline": first, "arguments": {"class_labels": LABELS[0], "seed": 5}},
        "same seed": {"pipeline": first, "arguments": {"class_labels": LABELS[0], "seed": 5}},
        "other seed": {"pipeline": first, "arguments": {"class_labels": LABELS[0], "seed": 6}},
    }
    (folder / "requests.json").write_text(json.dumps([*requests.values()]))
    save_file({"noise": noise_of(range(len(LABELS)), (4, 4, 4), SEED)}, folder / "noise.safetensors")
    script = Path(__file__).parents[1] / "support" / "pipeline_process.py"
    # Where diffusers keeps code that it loads; two processes must not write there at a time.
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-W", "error::UserWarning", str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not expected" not in done.stderr, done.stderr
    assert "cannot get type annotation" not in done.stderr, done.stderr
    images = load_file(folder / "images.safetensors")
    return {case: images[str(number)] for number, case in enumerate(requests)} | {"folder": folder}


def ours(inputs):
    """Images of our own sampler, uint8 [B, 3, H, W]."""
    sampler, config = Sampler.load(inputs, torch.device("cpu")), inputs.config
    return sampler.images(range(len(LABELS)), labels_of(inputs), SEED, config.guidance, config.solver)


def distance(theirs, ours):
    return ((theirs * 255).round() - ours.float()).abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_images_are_ours_from_equal_noise(sampled, inputs, case):
    expected = ours(inputs[case])
    assert expected.float().std() > 10, "flat images prove little"
    assert distance(sampled[case], expected) <= 1


def test_a_saved_pipeline_is_the_same(sampled):
    assert torch.equal(sampled["saved"], sampled["heun"])
    folder = sampled["folder"]
    files = [{path.relative_to(folder / name) for path in (folder / name).rglob("*.py")} for name in ("heun", "saved")]
    assert files[0] == files[1]
    assert len(files[0]) == 3


def test_arguments_of_a_call(sampled, inputs):
    assert torch.equal(sampled["names"], sampled["interval and channels"])
    assert distance(sampled["asked"], ours(inputs["shift"])) <= 1
    assert distance(sampled["bfloat16"], ours(inputs["interval and channels"])) <= 16
    assert torch.equal(sampled["seed"], sampled["same seed"])
    assert not torch.equal(sampled["seed"], sampled["other seed"])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ("guidance.routing_scale=2", "no guidance.routing_scale in diffusers: set it to 1"),
        ("guidance.weak={{model: {}/lightningdit/export, scale: 2}}", "no guidance.weak in diffusers: set it to null"),
        ("solver.name=dopri5", "no solver.name=dopri5 in diffusers: set one of euler, heun"),
    ],
)
def test_sampling_that_a_pipeline_lacks_is_refused(runs, tmp_path, capsys, changes, line):
    folder = runs["routed"].storage.url()
    command = ["export", "pipeline", str(tmp_path / "out"), "--config", f"{folder}/config.yaml"]
    assert main([*command, changes.format(folder)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/out: {line}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("lightningdit.head", {"head": {"depth": 1, "width": 32, "heads": 2}}),
        ("lightningdit.intermediate_head", {"intermediate_head": {"after_block": 1}}),
        ("lightningdit.routing.fuse", {"routing": {"first_block": 0, "last_block": 0, "fuse": {}}}),
        ("lightningdit.conditioning", {"conditioning": "in_context"}),
        ("lightningdit.class_token", {"class_token": {"width": 8}}),
        ("lightningdit.average_velocity", {"average_velocity": True}),
    ],
)
def test_a_network_without_like_is_refused(tmp_path, key, changes):
    config = LightningDiTConfig.model_validate(small_models.LIGHTNINGDIT.model_dump() | changes)
    model = LightningDiT(config, small_models.TOKENIZER.latent_dim, small_models.GRID)
    with pytest.raises(UserError, match=rf"out: no {key} in diffusers: take the run's own export$"):
        save_diffusers_lightningdit(str(tmp_path / "out"), model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["pipeline"], ["lightningdit", "--format", "diffusers"]])
def test_a_folder_comes_back_bit_for_bit(runs, tmp_path, capsys, words):
    run, other = (Path(each.storage.url()) for each in (runs["data"], trained_run(tmp_path, "other", MODELS["data"])))
    what, *options = words
    assert main(["export", what, str(tmp_path / "out"), *options, "--config", f"{run}/config.yaml"]) == 0
    shutil.rmtree(other / "lightningdit")  # a run's own stays
    command = ["import", "lightningdit", str(tmp_path / "out"), "--config", f"{other}/config.yaml"]
    assert main(command) == 0
    expected, found = (load_file(each / "lightningdit/export/model.safetensors") for each in (run, other))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    capsys.readouterr()
    assert main([*command, "lightningdit.mlp=gelu"]) == 2
    assert 'config.json: its mlp is "swiglu", but the run\'s is "gelu"' in capsys.readouterr().err


def test_other_folders_are_no_lightningdit(runs, tmp_path, capsys):
    config = f"{runs['data'].storage.url()}/config.yaml"
    assert main(["export", "tokenizer", str(tmp_path), "--config", config, "--format", "diffusers"]) == 0
    command = [
        "import",
        "lightningdit",
        str(tmp_path),
        "--config",
        f"{trained_run(tmp_path).storage.url()}/config.yaml",
    ]
    shutil.rmtree(tmp_path / "run/lightningdit")
    assert main(command) == 2
    assert "config.json: a model of the class AutoencoderKL; expected LightningDiT" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    assert main(command) == 2
    assert "config.json: no such file; give a folder that vavae export writes" in capsys.readouterr().err
