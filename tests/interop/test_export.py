"""Exports: the model that comes back is the model that went in, and anything else is refused in one line."""

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import small_models
from torch import nn

from vavae.config import added
from vavae.errors import UserError
from vavae.interop.export import (
    ALIGNMENT,
    DESCRIPTION,
    WEIGHTS,
    LightningDiTDescription,
    TokenizerDescription,
    load_alignment,
    load_exported_lightningdit,
    load_exported_tokenizer,
    save_export,
    strip_prefix,
)
from vavae.interop.released_lightningdit import save_released_lightningdit
from vavae.losses.config import VisionFoundationLossConfig
from vavae.losses.vision_foundation import VisionFoundationLoss
from vavae.models.dit.config import LightningDiTConfig, RoutingConfig
from vavae.models.dit.model import LightningDiT
from vavae.models.tokenizer.config import TeacherConfig
from vavae.randomness import torch_generator
from vavae.storage.storage import Storage, sha256_of

LOSS = VisionFoundationLossConfig(cos_margin=0.3)
TOKENIZER = TokenizerDescription(
    tokenizer=small_models.TOKENIZER, teacher=TeacherConfig(), vision_foundation=LOSS, feature_dim=6
)
LIGHTNINGDIT = LightningDiTDescription(
    lightningdit=small_models.LIGHTNINGDIT,
    latent_dim=small_models.TOKENIZER.latent_dim,
    grid=small_models.GRID,
    tokenizer="t",
)


@pytest.fixture
def alignment():
    return small_models.randomized(VisionFoundationLoss(LOSS, small_models.TOKENIZER.latent_dim, 6))


@pytest.fixture
def tokenizer(storage, alignment):
    model = small_models.tokenizer()
    save_export(storage, TOKENIZER, {WEIGHTS: model.state_dict(), ALIGNMENT: alignment.state_dict()})
    return model


def equal(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_tokenizer_comes_back_with_its_projection(storage, tokenizer, alignment):
    loaded, description = load_exported_tokenizer(storage)
    images = torch.rand(2, 3, 8, 8, generator=torch_generator(0, "images"))
    assert description == TOKENIZER
    assert equal(loaded, tokenizer)
    assert torch.equal(loaded.encode(images).mean, tokenizer.encode(images).mean)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert equal(load_alignment(storage), alignment)


def test_a_lightningdit_comes_back(storage):
    model = small_models.lightningdit()
    save_export(storage, LIGHTNINGDIT, {WEIGHTS: model.state_dict()})
    loaded, description = load_exported_lightningdit(storage)
    assert description == LIGHTNINGDIT
    assert equal(loaded, model)
    x, labels = torch.randn(2, *x_shape(), generator=torch_generator(0, "x")), torch.tensor([0, 2])
    assert torch.equal(loaded(x, torch.tensor([0.2, 0.7]), labels), model(x, torch.tensor([0.2, 0.7]), labels))


def test_a_fusion_comes_back_and_goes_into_no_released_file(storage, tmp_path):
    routing = RoutingConfig(first_block=0, last_block=0, fuse={})
    config = small_models.LIGHTNINGDIT.model_copy(update={"routing": routing})
    model = LightningDiT(config, small_models.TOKENIZER.latent_dim, small_models.GRID)
    save_export(storage, LIGHTNINGDIT.model_copy(update={"lightningdit": config}), {WEIGHTS: model.state_dict()})
    loaded, description = load_exported_lightningdit(storage)
    assert equal(loaded, model)
    assert description.lightningdit.routing == routing
    with pytest.raises(UserError, match=r"model\.pt: the public LightningDiT has no lightningdit\.routing\.fuse"):
        save_released_lightningdit(tmp_path / "model.pt", model)


def x_shape():
    return small_models.TOKENIZER.latent_dim, small_models.GRID, small_models.GRID


def test_the_files_are_named_with_size_and_checksum_and_equal_models_are_equal_bytes(tmp_path, storage):
    model = small_models.lightningdit()
    files = save_export(storage, LIGHTNINGDIT, {WEIGHTS: model.state_dict()})
    assert set(files) == {WEIGHTS, DESCRIPTION}
    for name, info in files.items():
        path = storage.local_file(name)
        assert (path.stat().st_size, sha256_of(path)) == (info.bytes, info.sha256)
    assert save_export(Storage(str(tmp_path / "again")), LIGHTNINGDIT, {WEIGHTS: model.state_dict()}) == files


class LaterConfig(LightningDiTConfig):
    gate: float = added(1.0, neutral=0.0)


class LaterDescription(LightningDiTDescription):
    lightningdit: LaterConfig


def test_a_field_that_came_later_changes_no_byte_at_its_neutral_value(tmp_path, storage):
    before = save_export(storage, LIGHTNINGDIT, {})
    restored = LaterDescription.restore(yaml.safe_load(storage.read_bytes(DESCRIPTION)))
    assert restored.lightningdit.gate == 0
    assert save_export(Storage(str(tmp_path / "again")), restored, {}) == before


def test_strided_and_tracked_tensors_are_stored(storage):
    weight = nn.Parameter(torch.arange(6.0).reshape(2, 3)).t()
    save_export(storage, LIGHTNINGDIT, {WEIGHTS: {"weight": weight}})
    assert torch.equal(load_file(storage.local_file(WEIGHTS))["weight"], weight)


def lose_a_tensor(storage):
    state = small_models.tokenizer().state_dict()
    del state["quant_conv.weight"]
    save_export(storage, TOKENIZER, {WEIGHTS: state})


def add_a_tensor(storage):
    save_export(storage, TOKENIZER, {WEIGHTS: {**small_models.tokenizer().state_dict(), "more": torch.ones(1)}})


def change_a_shape(storage):
    save_export(
        storage, TOKENIZER, {WEIGHTS: {**small_models.tokenizer().state_dict(), "quant_conv.bias": torch.ones(1)}}
    )


def truncate(storage):
    storage.write_bytes(WEIGHTS, storage.read_bytes(WEIGHTS)[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_tensor, "quant_conv.weight"),
        (add_a_tensor, "more"),
        (change_a_shape, "quant_conv.bias"),
        (truncate, "header"),
        (lambda storage: storage.write_bytes(WEIGHTS, b""), "header"),
        (lambda storage: storage.delete(WEIGHTS), "no such file"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(storage, tokenizer, damage, message):
    damage(storage)
    with pytest.raises(UserError, match=f"model.safetensors: .*{message}.*; export the model again$") as caught:
        load_exported_tokenizer(storage)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lightningdit: 3",
        "{half",
        "!!python/object/apply:os.system ['false']",
        yaml.safe_dump(LIGHTNINGDIT.model_dump(mode="json")),
        yaml.safe_dump({**TOKENIZER.model_dump(mode="json"), "more": 1}),
    ],
)
def test_another_description_is_refused_in_one_line(storage, tokenizer, text):
    storage.write_bytes(DESCRIPTION, text.encode())
    with pytest.raises(UserError, match=r"model.yaml: not the description of such a model") as caught:
        load_exported_tokenizer(storage)
    assert "\n" not in str(caught.value)


def test_a_folder_without_an_export_is_refused(storage):
    with pytest.raises(UserError, match=r"storage: no model.yaml there, so this is no export"):
        load_exported_lightningdit(storage)


def test_a_part_of_a_module_is_named_as_if_it_were_alone():
    module = nn.ModuleDict({"model": nn.BatchNorm1d(2), "teacher": nn.Linear(1, 1)})
    part = strip_prefix("model.", module.state_dict())
    assert part.keys() == module["model"].state_dict().keys()
    assert part["weight"].data_ptr() == module["model"].weight.data_ptr()
