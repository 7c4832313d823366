"""`vavae push` to a small hub on loopback, and `hf-hub:` addresses wherever weights are read."""

import json
import pickle
import re
import shutil
import socket

import huggingface_hub
import pytest
import torch
import yaml
from support.hub_server import READER, TOKEN, Hub, serving
from support.trained_run import MEAN, trained_run

import vavae
from vavae.cli.main import main
from vavae.config import digest
from vavae.errors import UserError
from vavae.interop.export import DESCRIPTION
from vavae.interop.released_tokenizer import save_released_tokenizer
from vavae.runs.files import CONFIG, METRICS, SAMPLES
from vavae.runs.jobs import JOBS
from vavae.runs.run import Run
from vavae.storage.artifact import Artifact, commit
from vavae.storage.storage import Storage
from vavae.training.warm_start import starting_lightningdit, starting_weights

ADDRESS = "hf-hub:me/digits"
OWN_LAYOUT = "solver.name=dopri5"
"""Override under which diffusers has no like of a run."""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that is the one that everything here asks, with the token of `me`, and an empty cache."""
    hub = Hub()
    constants = huggingface_hub.constants
    with serving(hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the store that the hub itself has
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("runs"), "digits")


@pytest.fixture
def push(run):
    """Exit status of ``vavae push`` of the run."""
    return lambda *words, name="me/digits": main(["push", run.storage.url(), name, *words])


def same(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("layout", ["diffusers", "own"])
def test_what_is_pushed_is_the_run_again_bit_for_bit(layout, hub, run, push, capsys):
    overrides = [OWN_LAYOUT] if layout == "own" else []
    assert push("--message", "first", *overrides) == 0
    assert capsys.readouterr().out.endswith(f"{huggingface_hub.constants.ENDPOINT}/me/digits\n")
    assert hub.repositories["me/digits"]["message"] == "first"
    files, place = hub.files("me/digits"), run.storage.url()
    name = "diffusion_pytorch_model" if layout == "diffusers" else "model"
    weights = {path for path in files if path.endswith(".safetensors") and "latents" not in path}
    assert weights == {f"vae/{name}.safetensors", f"transformer/{name}.safetensors"}, "each weight is there once"
    assert not any(str(run.config.storage.root).encode() in data for data in files.values()), "nobody's own folders"
    assert ("model_index.json" in files) == (layout == "diffusers")
    assert same(vavae.load_tokenizer(ADDRESS), vavae.load_tokenizer(place))
    assert not any(path.startswith("GET /me/digits/resolve") and "transformer/d" in path for path in hub.requests)
    assert same(vavae.load_lightningdit(ADDRESS), vavae.load_lightningdit(place))
    assert same(vavae.load_lightningdit(f"{ADDRESS}/transformer@main"), vavae.load_lightningdit(place))
    theirs, ours = vavae.Sampler.from_run(ADDRESS), vavae.Sampler.from_run(place, overrides)
    assert theirs.classes == ours.classes
    assert torch.equal(theirs.sample(["a", "c"], seeds=range(3)), ours.sample(["a", "c"], seeds=range(3)))
    again = vavae.Sampler.from_run(Run.at(ADDRESS), ["guidance.scale=2"])
    assert again.config.guidance.scale == 2
    assert again.config.name == "digits"


def test_a_push_takes_the_place_of_an_earlier_one_and_a_branch_is_made(hub, push):
    assert push() == push(OWN_LAYOUT) == push("--revision", "v2") == 0
    main_branch, other = hub.files("me/digits"), hub.files("me/digits", "v2")
    assert "vae/model.safetensors" in main_branch
    assert not {"model_index.json", "vae/diffusion_pytorch_model.safetensors"} & main_branch.keys()
    assert "model_index.json" in other
    assert same(vavae.load_tokenizer(ADDRESS), vavae.load_tokenizer(f"{ADDRESS}@v2"))
    assert 'vavae.Sampler.from_run("hf-hub:me/digits@v2")' in other["README.md"].decode()


def test_diffusers_reads_the_tokenizer_from_the_hub(hub, run, push):
    diffusers = pytest.importorskip("diffusers")
    assert push() == 0
    autoencoder = diffusers.AutoencoderKL.from_pretrained("me/digits", subfolder="vae")
    assert autoencoder.config.latents_mean == MEAN.tolist()
    latents = torch.randn(1, 4, 4, 4)
    ours = vavae.load_tokenizer(run.storage.url(), device="cpu").decode(latents)
    torch.testing.assert_close(autoencoder.decode(latents).sample, ours)
    index = json.loads(hub.files("me/digits")["model_index.json"])
    assert index["transformer"] == ["lightningdit_transformer", "LightningDiTTransformer2DModel"]


@pytest.mark.parametrize("url", ["tokenizer alone", "memory://pushed/runs"])
def test_a_tokenizer_alone_and_a_run_in_a_store(url, hub, run, tmp_path, capsys):
    place = Storage(url if "://" in url else str(tmp_path)).child("copy")
    for path in run.storage.list(recursive=True):
        if "://" in url or not path.startswith("lightningdit"):
            place.write_bytes(path, run.storage.read_bytes(path))
    assert main(["push", place.url(), "me/digits"]) == 0
    assert same(vavae.load_tokenizer(ADDRESS), vavae.load_tokenizer(run.storage.url()))
    card = hub.files("me/digits")["README.md"].decode()
    if "://" in url:
        assert same(vavae.load_lightningdit(ADDRESS), vavae.load_lightningdit(run.storage.url()))
    else:
        assert "AutoencoderKL.from_pretrained" in card
        assert json.loads(hub.files("me/digits")["vae/config.json"])["latents_mean"] == MEAN.tolist()
        with pytest.raises(UserError, match="no LightningDiT yet"):
            vavae.load_lightningdit(ADDRESS)


def finish(run, value=1.5, sampled_with="c"):
    """Leave what the last two jobs of a run would, measured on a LightningDiT of some digest."""
    models = {**run.inputs("sample"), "train_lightningdit": sampled_with * 64}
    for job, inputs in (("sample", models), ("evaluate", {"train_vavae": "a" * 64, "sample": "d" * 64})):
        record = Artifact(
            kind=JOBS[job].makes, digest="d" * 64, config=digest(run.identity(job)), inputs=inputs, files={}
        )
        commit(run.storage, run.prefix(job), record)
    metric = {"value": value, "unit": "dB", "better": "higher", "protocol": "of a | test", "spread": 0.1}
    run.storage.write_json(METRICS, {"psnr": metric})
    run.storage.write_bytes(SAMPLES, b"\x89PNG")


def test_the_card_says_what_was_measured_and_how(tmp_path, capsys):
    run = trained_run(tmp_path, "mine", shards={"source": "huggingface:owner/images#train", "image_size": 8})
    out = tmp_path / "out"
    finish(run)
    (tmp_path / "mine" / "shards").mkdir()
    manifest = {"splits": {"train": []}, "classes": ["a", "b", "c"], "image_size": 8, "sources": {}, "skipped": []}
    run.storage.write_json("shards/manifest.json", manifest)
    assert main(["push", run.storage.url(), "me/digits", "--out", str(out), "--license", "mit"]) == 0
    assert "nothing uploaded" in capsys.readouterr().out
    text = (out / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    card = yaml.safe_load(front)
    assert (card["license"], card["library_name"], card["datasets"]) == ("mit", "diffusers", ["owner/images"])
    (result,) = card["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "psnr", "value": 1.5, "args": {"protocol": "of a | test"}}]
    assert "| psnr | 1.5 ± 0.1 dB | higher |" in body
    assert "- psnr: of a | test" in body
    assert "![Grid of generated images, a class per row](samples.png)" in body
    assert f"| tokenizer | `{'a' * 64}` |" in body
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe["shards"] == {"source": "huggingface:owner/images#train", "image_size": 8}
    assert "storage" not in recipe
    shutil.rmtree(out)
    finish(run, sampled_with="e")
    assert main(["push", run.storage.url(), "me/digits", "--out", str(out)]) == 0
    text = (out / "README.md").read_text()
    assert "there are no figures of these models" in text
    assert "psnr" not in text, "figures of another model"
    assert not (out / METRICS).exists()
    assert main(["push", str(out), "me/other", "--out", str(tmp_path / "copy")]) == 0, "a pushed run is a run"


def test_nothing_of_its_owner_is_pushed_with_a_run(tmp_path):
    private = {
        "shards": {"source": "/home/alice/faces.zip#train", "labels": "~/alice/classes.csv", "image_size": 8},
        "teacher": {"weights": "/home/alice/teacher.safetensors"},
        "workers": {"hourly_price": 2.5},
        "tracking": ["wandb"],
    }
    run = trained_run(tmp_path, "mine", **private)
    finish(run, sampled_with="c")  # and the manifest of the shards is gone
    prefix, folder, record = run.prefix("train_vavae"), run.folder("train_vavae"), run.require("train_vavae")
    described = yaml.safe_load(folder.read_bytes(DESCRIPTION))
    described["teacher"]["weights"] = private["teacher"]["weights"]
    folder.write_bytes(DESCRIPTION, yaml.safe_dump(described).encode())
    size = folder.size(DESCRIPTION)
    files = record.files | {DESCRIPTION: record.files[DESCRIPTION].model_copy(update={"bytes": size})}
    details = {"identity": {"teacher": private["teacher"]}}
    commit(run.storage, prefix, record.model_copy(update={"files": files, "details": details}))
    out = tmp_path / "out"
    assert main(["push", run.storage.url(), "me/digits", "--out", str(out)]) == 0
    texts = {path.name: path.read_text() for path in out.rglob("*") if path.suffix in {".md", ".yaml", ".json"}}
    assert not [name for name, text in texts.items() if re.search(r"alice|wandb|hourly_price: 2", text)]
    for name in ("config.yaml", "README.md", "artefact.json", DESCRIPTION):
        assert "path/to/teacher.safetensors" in "".join(each.read_text() for each in out.rglob(name)), name
    shards = yaml.safe_load(texts["config.yaml"])["shards"]
    assert (shards["source"], shards["labels"]) == ("path/to/faces.zip#train", "path/to/classes.csv")
    assert ": faces.zip#train at 8 px" in texts["README.md"]
    assert SAMPLES in {path.name for path in out.iterdir()}


def test_trainings_begin_with_what_is_on_the_hub(hub, run, push):
    assert push() == 0
    training = run.config.train_vavae.model_copy(update={"start_from": ADDRESS})
    found = starting_weights(run.config.model_copy(update={"train_vavae": training}), 6)
    expected = vavae.load_tokenizer(run.storage.url()).state_dict()
    shards = found.engines["generator"]
    assert all(torch.equal(shards[f"autoencoder.{name}"].values, tensor.flatten()) for name, tensor in expected.items())
    training = run.config.train_lightningdit.model_copy(update={"start_from": ADDRESS})
    started = Run(run.config.model_copy(update={"train_lightningdit": training}))
    start = started.starting_lightningdit()
    assert start.digest == run.require("train_lightningdit").digest
    commit_name = hub.repositories["me/digits"]["branches"]["main"]
    folder = pickle.loads(pickle.dumps(start)).folder
    assert folder.root == f"hf-hub:me/digits/transformer@{commit_name}", "each machine fetches the same by itself"
    weights = starting_lightningdit(start, run.config.lightningdit)
    expected = vavae.load_lightningdit(run.storage.url()).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("words", "settings", "line"),
    [
        (["--out", "OUT/mine"], {}, r"OUT/mine: there is something already: name an empty folder"),
        (["guidance.weak={model: other, scale: 2}"], {}, r"guidance.weak: its samples need a second LightningDiT"),
        (["--private"], {"public": True}, r"me/digits: it is there and public, so --private can't be"),
        ([], {"name": "digits"}, r"digits: no owner: name the repository as owner/name"),
        ([], {"name": "me/a b"}, r"me/a b: .*: name the repository as owner/name"),
        ([], {"name": "you/digits"}, r"you/digits: the account of this token may not write to you \(You don't have.*"),
        (
            [],
            {"token": "hf_wrong"},
            r"me/digits: http.* does not accept the token \(Invalid .*\): log in with `hf auth",
        ),
        (
            [],
            {"token": ""},
            r"no token of the hub: log in with `hf auth login`, or set HF_TOKEN .*; --out FOLDER writes",
        ),
        (["--license", "none"], {}, r"me/digits: the hub does not take the card \(.*license.*\): correct --license"),
        ([], {"offline": True}, r"HF_HUB_OFFLINE is set, which forbids to ask the hub: unset it; --out FOLDER writes"),
        ([], {"unreachable": True}, r"me/digits: no way to http.* \(.*\): try again where there is a connection"),
    ],
)
def test_what_can_not_be_pushed_is_one_line(words, settings, line, hub, push, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    if "token" in settings:
        monkeypatch.setenv("HF_TOKEN", settings["token"])
    if "public" in settings:
        hub.create("me/digits")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", "offline" in settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        if "unreachable" in settings:
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        words = [word.replace("OUT", str(tmp_path)) for word in words]
        assert push(*words, name=settings.get("name", "me/digits")) == 2
    error = capsys.readouterr().err.replace(str(tmp_path), "OUT")
    assert re.fullmatch(f"error: {line}.*\n", error), error
    assert len(hub.repositories.get("me/digits", {"commits": "1"})["commits"]) == 1, "nothing was put there"


def test_a_run_without_a_tokenizer_is_refused(run, tmp_path, capsys):
    (tmp_path / CONFIG).write_bytes(run.storage.read_bytes(CONFIG))
    assert main(["push", str(tmp_path), "me/digits", "--out", str(tmp_path / "out")]) == 2
    assert "nothing to push yet, for no tokenizer is trained or imported" in capsys.readouterr().err


def test_an_upload_that_broke_off_is_made_by_the_same_command_again(hub, push, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.breaks_uploads = True
    assert push() == 2
    error = capsys.readouterr().err
    assert re.search(r"^error: me/digits: the upload broke off \(.+\); nothing is lost: run the same", error, re.M), (
        error
    )
    assert "Traceback" not in error
    assert hub.files("me/digits").keys() == {".gitattributes"}, "all of it or nothing"
    hub.breaks_uploads = False
    assert push() == 0
    assert "README.md" in hub.files("me/digits")


def test_addresses_that_lead_nowhere_and_the_cache(hub, run, push, monkeypatch):
    assert push("--private") == 0
    assert hub.repositories["me/digits"]["private"]
    for address, line in {
        "hf-hub:me/nothing": r"hf-hub:me/nothing: no such repository, or none that this account may read: .*hf auth",
        f"{ADDRESS}@v9": r"hf-hub:me/digits@v9: no such revision in this repository: name a branch",
        f"{ADDRESS}/unet": r"hf-hub:me/digits/unet: no unet in this repository: correct the path",
        "hf-hub:me/digits/../../x": r"hf-hub:me/digits/\.\./\.\./x: write hf-hub:owner/name",
    }.items():
        with pytest.raises(UserError, match=f"^{line}"):
            vavae.load_tokenizer(address)
    tokenizer = vavae.load_tokenizer(ADDRESS)
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(UserError, match="none that this account may read"):
        vavae.load_tokenizer(f"{ADDRESS}@{'0' * 40}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert same(vavae.load_tokenizer(ADDRESS), tokenizer), "what the cache holds needs no network"
    with pytest.raises(UserError, match=r"^hf-hub:me/other is neither in the cache \S+ nor reachable: fetch it where "):
        vavae.load_lightningdit("hf-hub:me/other")


def test_a_file_on_the_hub_that_others_have_released(hub, run, tmp_path):
    model = vavae.load_tokenizer(run.storage.url())
    save_released_tokenizer(tmp_path / "released.pt", model)
    hub.create("lab/models")
    files = {"released.pt": (tmp_path / "released.pt").read_bytes(), "big.safetensors": b"never fetched"}
    hub.commit("lab/models", "main", files)
    assert same(vavae.load_tokenizer("hf-hub:lab/models/released.pt@main"), model)
    assert not any("big" in request for request in hub.requests)
