"""Loading is strict, by whichever way the weights come, and what is loaded stays as it is."""

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vavae.errors import UserError
from vavae.metrics.features import preprocess
from vavae.models.backbones.config import EMBEDDED_WEIGHTS, BackboneConfig
from vavae.models.backbones.load import ImageNormalizer, load_backbone, meta_backbone
from vavae.models.backbones.weights import embedded_file

EMBEDDED = BackboneConfig(name="efficientnet_lite0")


def test_torchvision_imports_once_timm_has_been_asked_for():
    import torchvision

    assert torchvision.transforms.functional.crop(torch.zeros(3, 4, 4), 0, 0, 2, 2).shape == (3, 2, 2)
    assert torch.ops.torchvision.nms is not None


@pytest.mark.parametrize(("name", "last_block"), [(EMBEDDED.name, 15), ("efficientnet_lite2", 20)])
def test_embedded_tensors_land_where_they_belong(name: str, last_block: int):
    stored = torch.load(embedded_file(name), weights_only=True)
    loaded = load_backbone(BackboneConfig(name=name)).state_dict()
    assert len(loaded) == len(stored)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded.values(), stored.values(), strict=True))
    for ours, theirs in {
        "conv_stem.weight": "_conv_stem.weight",
        "blocks.1.0.conv_pw.weight": "_blocks.1._expand_conv.weight",
        "blocks.6.0.bn3.running_var": f"_blocks.{last_block}._bn2.running_var",
        "classifier.bias": "_fc.bias",
    }.items():
        assert torch.equal(loaded[ours], stored[theirs]), ours


@pytest.mark.parametrize("name", EMBEDDED_WEIGHTS)
def test_an_embedded_network_sees_a_palace(name: str):
    from sklearn.datasets import load_sample_image

    model = load_backbone(BackboneConfig(name=name))
    photograph = torch.from_numpy(load_sample_image("china.jpg")[:, 106:-107].copy()).permute(2, 0, 1)[None]
    size = model.pretrained_cfg["input_size"][-1]
    logits = model(ImageNormalizer.of(model)(preprocess(photograph, size, "bicubic")))
    assert logits.isfinite().all()
    assert logits.argmax().item() == 698  # of ImageNet's classes


def test_the_embedded_network_also_loads_in_the_names_of_timm(tmp_path):
    model = load_backbone(EMBEDDED)
    file = tmp_path / "sorted.safetensors"  # where the order says nothing
    save_file(model.state_dict(), file)
    again = load_backbone(BackboneConfig(name=EMBEDDED.name, weights=str(file))).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def vit(tmp_path):
    """A tiny transformer of timm, and random tensors for it."""
    config = BackboneConfig(name="test_vit.r160_in1k", weights=str(tmp_path / "vit.safetensors"))
    return config, {name: torch.randn(tensor.shape) for name, tensor in meta_backbone(config).state_dict().items()}


def test_a_checkpoint_of_a_timm_model(vit):
    config, state = vit
    save_file(state, config.weights)
    loaded = load_backbone(config)
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert "state_dict" not in loaded.pretrained_cfg, "a second copy of all tensors"


def test_a_checkpoint_in_half_precision_is_used_in_single(vit):
    config, state = vit
    save_file({name: tensor.half() for name, tensor in state.items()}, config.weights)
    loaded = load_backbone(config)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.state_dict()["norm.weight"], state["norm.weight"].half().float())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"norm.weight": torch.zeros(7)}, "tensor norm.weight is [7], [64] expected"),
        ({"norm.weight": None}, "there is no tensor norm.weight, [64] expected"),
        ({"norm.surplus": torch.zeros(1)}, "it has no tensor norm.surplus"),
        ({"pos_embed": torch.zeros(3)}, "tensor pos_embed is [3], [1, 101, 64] expected"),
        (
            {"patch_embed.proj.weight": torch.zeros(2, 2, 2, 2, 2)},
            "tensor patch_embed.proj.weight is [2, 2, 2, 2, 2], [64, 3, 16, 16] expected",
        ),
    ],
)
@pytest.mark.parametrize("num_classes", [None, 0])
def test_tensors_of_another_network_are_named(vit, changes, complaint, num_classes):
    config, state = vit
    state = {name: tensor for name, tensor in {**state, **changes}.items() if tensor is not None}
    save_file(state, config.weights)
    with pytest.raises(UserError) as error:
        load_backbone(config, num_classes=num_classes)
    assert f"the weights at {config.weights} are not those of {config.name}: {complaint}" in str(error.value)
    assert "\n" not in str(error.value)


class Harmful:
    """A pickle that would run code."""

    def __reduce__(self):
        return eval, ("1 / 0",)


def saved(path: Path, content: object) -> bytes:
    torch.save(content, path)
    return path.read_bytes()


def saved_safely(path: Path) -> bytes:
    save_file({"weight": torch.zeros(99)}, path)
    return path.read_bytes()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["test_vit.r160_in1k", EMBEDDED.name])
@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("cut.safetensors", lambda path: saved_safely(path)[:-1], "cannot be read (SafetensorError: "),
        ("cut.pth", lambda path: saved(path, {"weight": torch.zeros(99)})[:-100], "cannot be read (RuntimeError: "),
        ("page.safetensors", lambda path: b"<!DOCTYPE html>", "cannot be read (SafetensorError: "),
        ("page.pth", lambda path: b"<!DOCTYPE html>", "cannot be read ("),
        ("empty.pth", lambda path: b"", "cannot be read (EOFError: "),
        ("harmful.pth", lambda path: pickle.dumps({"weight": Harmful()}), "cannot be read ("),
        ("harmful_archive.pth", lambda path: saved(path, {"weight": Harmful()}), "cannot be read ("),
        ("list.pth", lambda path: saved(path, [torch.zeros(1)]), "cannot be read (AttributeError: "),
        ("nothing.pth", lambda path: saved(path, {}), "they hold no tensors"),
        ("number.pth", lambda path: saved(path, {"weight": 1}), "there is no tensor "),
        ("nested.pth", lambda path: saved(path, {"teacher": {"weight": torch.zeros(1)}}), "there is no tensor "),
    ],
)
def test_what_holds_no_tensors_of_the_network_is_refused(tmp_path, name, file, content, complaint):
    path = tmp_path / file
    path.write_bytes(content(path))
    with pytest.raises(UserError) as error:
        load_backbone(BackboneConfig(name=name, weights=str(path)))
    message = str(error.value)
    assert message.startswith(f"the weights at {path} ")
    assert complaint in message
    assert "\n" not in message


def test_surplus_tensors_are_not_left_out_of_the_embedded_network(tmp_path):
    stored = torch.load(embedded_file(EMBEDDED.name), weights_only=True)
    torch.save({**stored, "more": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match="it has no tensor"):
        load_backbone(BackboneConfig(name=EMBEDDED.name, weights=str(tmp_path / "more.pth")))


def test_frozen_for_good_also_in_copies():
    parent = nn.ModuleList([load_backbone(EMBEDDED, num_classes=0)])
    for holder in (parent, copy.deepcopy(parent), pickle.loads(pickle.dumps(parent))):
        assert holder.train().training
        assert not any(module.training for module in holder[0].modules())
        assert not any(parameter.requires_grad for parameter in holder.parameters())
        assert holder[0].train() is holder[0]


def test_the_classifier_can_be_dropped():
    assert load_backbone(EMBEDDED, num_classes=0)(torch.zeros(2, 3, 32, 32)).shape == (2, 1280)


@pytest.mark.parametrize(("mean", "std"), [((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))])
def test_normalized_images_are_centered_on_the_mean(mean: Sequence[float], std: Sequence[float]):
    normalizer = ImageNormalizer(mean, std)
    center = torch.tensor(mean).view(1, 3, 1, 1)
    deviation = torch.tensor(std).view(1, 3, 1, 1)
    zeros = normalizer(2 * center - 1)
    ones = normalizer(2 * (center + deviation) - 1)
    torch.testing.assert_close(zeros, torch.zeros_like(zeros), rtol=0, atol=1e-6)
    torch.testing.assert_close(ones, torch.ones_like(ones))


@pytest.mark.parametrize("name", EMBEDDED_WEIGHTS)
def test_the_embedded_statistics_are_those_of_its_training(name: str):
    normalizer = ImageNormalizer.of(load_backbone(BackboneConfig(name=name)))
    images = torch.full((1, 3, 1, 1), 2 * 0.498 - 1)
    torch.testing.assert_close(normalizer(images), torch.zeros(1, 3, 1, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(normalizer(images + 2 * 0.502), torch.ones(1, 3, 1, 1))
