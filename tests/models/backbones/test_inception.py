"""The Inception network: what it gives, and what is said where its weights are not to be had."""

import importlib.util

import pytest
import torch
from support.inception import random_inception

from vavae.errors import UserError
from vavae.models.backbones.config import InceptionConfig
from vavae.models.backbones.inception import Inception, check_inception, load_inception

# isort: split
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

RELEASED = InceptionConfig().weights


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> InceptionConfig:
    return random_inception(tmp_path_factory.mktemp("inception"))


@pytest.fixture(scope="module")
def inception(config) -> Inception:
    return load_inception(config)


def images(count: int = 2, side: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_features_are_those_of_torch_fidelity(inception, config):
    theirs = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased", "logits"], config.weights)
    pooled, unbiased, _ = theirs(images())
    found = inception(images())
    assert torch.equal(found.pooled, pooled)
    assert torch.equal(found.logits, unbiased)
    assert (found.pooled[0] - found.pooled[1]).abs().max() > 1e-3
    assert not found.pooled.requires_grad


def test_spatial_features_are_seven_channels_behind_one_convolution_in_the_order_of_tensorflow(inception):
    block, seen = inception.network.Mixed_6d, []
    handle = block.register_forward_hook(lambda _, inputs, output: seen.append(output))
    found = inception(images()).spatial
    handle.remove()
    assert found.shape == (2, 17 * 17 * 7)
    row, column, channel = 3, 11, 5
    assert torch.equal(found[:, (row * 17 + column) * 7 + channel], seen[0][:, channel, row, column])
    assert found.min() == 0, "behind the activation"


def test_it_is_frozen_for_good(inception):
    inception.train()
    assert not inception.network.training
    assert not any(parameter.requires_grad for parameter in inception.parameters())


def test_other_weights_are_refused(config):
    with pytest.raises(UserError, match=r"SHA-256 [0-9a-f]{64}, not 6726825d"):
        load_inception(InceptionConfig(weights=config.weights))


def test_the_first_digits_of_a_checksum_do(config):
    check_inception(config.model_copy(update={"sha256": config.sha256[:8]}))
    load_inception(config.model_copy(update={"sha256": config.sha256[:8]}))


@pytest.mark.parametrize("content", [b"", b"no pickle at all", None])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    from vavae.storage.storage import sha256_of

    file = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(3)}, file) if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=r"holds no weights of Inception .* fetch https://github.com"):
        load_inception(InceptionConfig(weights=str(file), sha256=sha256_of(file)))


@pytest.mark.parametrize("find", [check_inception, load_inception])
def test_a_missing_file_is_named_with_what_belongs_there(tmp_path, find):
    with pytest.raises(UserError, match=rf"no weights of Inception at .*gone.pth: put {RELEASED} there"):
        find(InceptionConfig(weights=str(tmp_path / "gone.pth")))


@pytest.mark.parametrize("find", [check_inception, load_inception])
def test_without_a_connection_the_download_and_its_place_are_named(tmp_path, monkeypatch, find):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"download http://127.0.0.1:9/some.pth .* evaluate.metrics.inception.weights"):
        find(InceptionConfig(weights="http://127.0.0.1:9/some.pth"))


def test_what_torch_has_downloaded_before_is_taken(config, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "some.pth").symlink_to(config.weights)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    there = config.model_copy(update={"weights": "http://127.0.0.1:9/some.pth"})
    check_inception(there)
    assert load_inception(there)(images()).pooled.shape == (2, 2048)


def test_without_torch_fidelity_the_extra_is_named(config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"\.\[fidelity\]"):
        check_inception(config)
