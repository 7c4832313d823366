"""Weights are found, or their absence is explained, before anything starts."""

import http.server
import importlib.util
import threading

import huggingface_hub
import pytest

from vavae.backbones.config import BackboneConfig
from vavae.backbones.weights import check_weights
from vavae.errors import UserError

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
        huggingface_hub, "hf_hub_url", lambda repo, file: f"http://127.0.0.1:{server.server_port}/{repo}/{file}"
    )
    yield seen
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_embedded_weights_are_installed_with_the_tests():
    check_weights(BackboneConfig(name="efficientnet_lite0"))


def test_without_the_package_the_message_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vavae\[quickstart\]"):
        check_weights(BackboneConfig(name="efficientnet_lite0"))


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UserError, match="did you mean vit_large_patch14_dinov2"):
        check_weights(BackboneConfig(name="vit_large_patch14_dinov2.lvd142"))


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no weights of .* at .*gone\.pth"):
        check_weights(BackboneConfig(name=HUB_MODEL, weights=str(tmp_path / "gone.pth")))


def test_a_checkpoint_on_storage_is_enough(tmp_path):
    file = tmp_path / "there.pth"
    file.touch()
    check_weights(BackboneConfig(name=HUB_MODEL, weights=f"file://{file}"))


def test_a_cached_download_is_enough_without_a_connection(hub_cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = hub_cache / f"models--timm--{HUB_MODEL}"
    for file, text in {"refs/main": "abc", "snapshots/abc/model.safetensors": ""}.items():
        (repository / file).parent.mkdir(parents=True)
        (repository / file).write_text(text)
    check_weights(BackboneConfig(name=HUB_MODEL))


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
    for url in (lambda repo, file: real(repo, "absent"), lambda repo, file: "http://127.0.0.1:1/x"):
        monkeypatch.setattr(huggingface_hub, "hf_hub_url", url)
        with pytest.raises(UserError, match="nor reachable"):
            check_weights(BackboneConfig(name=HUB_MODEL))
    assert hub_server
