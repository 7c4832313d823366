"""LPIPS against torchmetrics' own on the same backbone; the teacher's distance by hand."""

import math

import huggingface_hub
import pytest
import torch

from vavae.errors import UserError
from vavae.losses.config import PerceptualLossConfig
from vavae.losses.perceptual import LPIPS, TeacherFeatureDistance, build_perceptual, published_heads, squared_distances
from vavae.models.backbones.load import meta_backbone
from vavae.models.backbones.weights import check_weights
from vavae.randomness import torch_generator


@pytest.fixture(scope="module")
def vgg_layers():
    """The layers of VGG16 with random weights; the classifier is never made."""
    layers = meta_backbone(PerceptualLossConfig().backbone).features.to_empty(device="cpu")
    generator = torch_generator(0, "vgg")
    for parameter in layers.parameters():
        fan_in = parameter[0].numel()
        parameter.data = torch.randn(parameter.shape, generator=generator) * math.sqrt(2 / fan_in) * 0.5
    return layers


def images(seed: int) -> torch.Tensor:
    return 2 * torch.rand(2, 3, 32, 32, generator=torch_generator(seed, "images")) - 1


def value_and_gradient(distance):
    """The distance of two batches, and its gradient with respect to the second."""
    reconstruction = images(1).requires_grad_()
    values = distance(images(0), reconstruction).flatten()
    return values.detach(), *torch.autograd.grad(values.sum(), reconstruction)


def test_lpips_equals_that_of_torchmetrics(vgg_layers, monkeypatch):
    from torchmetrics.functional.image import lpips as torchmetrics_lpips  # after torchvision has been made importable

    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda net, pretrained: vgg_layers)
    expected = value_and_gradient(torchmetrics_lpips._LPIPS(net="vgg"))
    assert (expected[0] > 1e-3).all()
    ours = value_and_gradient(LPIPS(vgg_layers, published_heads()).train())
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_lpips_equals_the_released_form(vgg_layers):
    """Which adds its epsilon to the length, not to the squared length: no difference where anything is active."""
    heads = published_heads()
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1)

    def features(x):
        x = (x - shift) / scale
        for index, layer in enumerate(vgg_layers):
            x = layer(x)
            if index in (3, 8, 15, 22, 29):
                yield x / (torch.sqrt((x**2).sum(dim=1, keepdim=True)) + 1e-10)

    def released(first, second):
        stages = zip(heads, features(first), features(second), strict=True)
        return sum(torch.einsum("c,bchw->bhw", head, (f - s) ** 2).mean(dim=(1, 2)) for head, f, s in stages)

    ours = value_and_gradient(LPIPS(vgg_layers, heads))
    torch.testing.assert_close(ours, value_and_gradient(released), rtol=1e-4, atol=1e-5)


def test_positions_without_any_activation_have_a_finite_gradient():
    features = torch.zeros(1, 4, 2, 2).requires_grad_()
    distances = squared_distances(features, torch.ones(1, 4, 2, 2))
    torch.testing.assert_close(distances.sum(dim=1), torch.ones(1, 2, 2))
    distances.sum().backward()
    assert features.grad.isfinite().all()


def test_lpips_of_equal_images_is_zero_and_the_network_is_frozen(vgg_layers):
    lpips = LPIPS(vgg_layers, published_heads())
    assert lpips(images(0), images(0)).tolist() == [0.0, 0.0]
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_teacher_distance_by_hand():
    # Two stages: directions at a right angle differ by 2 in square, equal directions of another length by 0.
    first = [torch.tensor([3.0, 0.0]).view(1, 2, 1, 1), torch.tensor([1.0, 1.0]).view(1, 2, 1, 1)]
    second = [torch.tensor([0.0, 7.0]).view(1, 2, 1, 1), torch.tensor([9.0, 9.0]).view(1, 2, 1, 1)]
    stages = {0.0: first, 1.0: second}
    distance = TeacherFeatureDistance(lambda image: stages[image.mean().item()])
    assert distance(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)).tolist() == pytest.approx([1.0])


def test_teacher_distance_is_per_image_and_reaches_the_reconstruction():
    distance = TeacherFeatureDistance(lambda batch: [batch, batch[:, :, ::2, ::2] + 1])
    reconstruction = torch.cat([images(0)[:1], images(1)[1:]]).requires_grad_()
    values = distance(images(0), reconstruction)
    assert values[0] == 0
    assert values[1] > 0
    (gradient,) = torch.autograd.grad(values.sum(), reconstruction)
    assert (gradient[1] != 0).any()


def test_kinds():
    assert build_perceptual(PerceptualLossConfig(kind="none"), list) is None
    assert build_perceptual(PerceptualLossConfig(weight=0.0), list) is None
    assert isinstance(build_perceptual(PerceptualLossConfig(kind="teacher_features"), list), TeacherFeatureDistance)
    with pytest.raises(UserError, match=r"no weights of vgg16\.tv_in1k at .*absent"):
        build_perceptual(PerceptualLossConfig(weights="/absent/vgg.pth"), list)
    with pytest.raises(ValueError, match="reads no weights"):
        PerceptualLossConfig(kind="none", weights="/absent/vgg.pth")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, r"weights of vgg16\.tv_in1k .*download https://\S+ .*set `weights`"),
        ("/absent/vgg.pth", r"no weights of vgg16\.tv_in1k at /absent/vgg\.pth"),
    ],
)
def test_missing_weights_are_found_without_building_the_network(weights, message, tmp_path, monkeypatch):
    """By the check that jobs make before a worker starts."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message) as error:
        check_weights(PerceptualLossConfig(weights=weights).backbone)
    assert "\n" not in str(error.value)
