"""Loading is strict, by whichever way the weights come, and what is loaded stays as it is."""

import copy
import pickle
from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vavae.backbones.config import BackboneConfig
from vavae.backbones.load import load_backbone, meta_backbone
from vavae.backbones.normalize import ImageNormalizer
from vavae.backbones.weights import embedded_file
from vavae.errors import UserError

EMBEDDED = BackboneConfig(name="efficientnet_lite0")


def test_torchvision_imports_once_timm_has_been_asked_for():
    import torchvision

    assert torchvision.transforms.functional.crop(torch.zeros(3, 4, 4), 0, 0, 2, 2).shape == (3, 2, 2)
    assert torch.ops.torchvision.nms is not None


def test_embedded_tensors_land_where_they_belong():
    stored = torch.load(embedded_file(), weights_only=True)
    model = load_backbone(EMBEDDED)
    for ours, theirs in {
        "conv_stem.weight": "_conv_stem.weight",
        "blocks.1.0.conv_pw.weight": "_blocks.1._expand_conv.weight",
        "blocks.6.0.bn3.running_var": "_blocks.15._bn2.running_var",
        "classifier.bias": "_fc.bias",
    }.items():
        assert torch.equal(model.state_dict()[ours], stored[theirs]), ours


def test_a_file_of_other_tensors_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold the tensors"):
        load_backbone(BackboneConfig(name=EMBEDDED.name, weights=str(tmp_path / "other.pth")))


def test_a_checkpoint_of_a_timm_model_is_loaded_strictly(tmp_path):
    config = BackboneConfig(name="test_vit.r160_in1k", weights=str(tmp_path / "vit.safetensors"))
    state = {name: torch.randn(tensor.shape) for name, tensor in meta_backbone(config).state_dict().items()}
    save_file(state, config.weights)
    assert torch.equal(load_backbone(config).state_dict()["norm.weight"], state["norm.weight"])
    del state["norm.weight"]
    save_file(state, config.weights)
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        load_backbone(config, num_classes=0)


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
def test_normalised_images_are_centred_on_the_mean(mean: Sequence[float], std: Sequence[float]):
    normalizer = ImageNormalizer(mean, std)
    centre = torch.tensor(mean).view(1, 3, 1, 1)
    deviation = torch.tensor(std).view(1, 3, 1, 1)
    zeros = normalizer(2 * centre - 1)
    ones = normalizer(2 * (centre + deviation) - 1)
    torch.testing.assert_close(zeros, torch.zeros_like(zeros), rtol=0, atol=1e-6)
    torch.testing.assert_close(ones, torch.ones_like(ones))


def test_the_embedded_statistics_are_those_of_its_training():
    normalizer = ImageNormalizer.of(load_backbone(EMBEDDED))
    images = torch.full((1, 3, 1, 1), 2 * 0.498 - 1)
    torch.testing.assert_close(normalizer(images), torch.zeros(1, 3, 1, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(normalizer(images + 2 * 0.502), torch.ones(1, 3, 1, 1))
