"""Heads on frozen features and differentiable augmentation: published numbers, closed forms, gradients."""

import pytest
import torch
from pydantic import ValidationError
from support.golden import golden

from vavae.errors import UserError
from vavae.losses.adversarial import DiscriminatorObjective, build_discriminator, generator_loss, hinge, vanilla
from vavae.losses.augmentation import Augmentation
from vavae.losses.config import AdversarialLossConfig, AugmentConfig, FeatureDiscriminatorConfig
from vavae.losses.feature_discriminator import (
    FrozenFeatures,
    Head,
    SpectralConv1d,
    advance_power_iterations,
    feature_dims,
)
from vavae.models.backbones.load import meta_backbone
from vavae.randomness import torch_generator

CONFIG = FeatureDiscriminatorConfig(name="efficientnet_lite0", image_size=64, layers=(4, 2, 3, 4), kernel=3)


def test_a_head_gives_the_published_numbers():
    spec, tensors = golden("beyond_rae")
    state, features = (
        {k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("head.state.", "head.in.")
    )
    head = Head(features["features"].shape[1], spec["head_kernel"]).double()
    head.load_state_dict(state)
    trained = [head(features["features"])[:, 0] for _ in range(2)]
    torch.testing.assert_close(trained[0], tensors["head.out.train"], rtol=1e-6, atol=1e-6)
    assert torch.equal(*trained), "a step has one weight, however many passes"
    advance_power_iterations(head)
    for name, vector in head.state_dict().items():
        if f"head.state_after.{name}" in tensors:
            torch.testing.assert_close(vector, tensors[f"head.state_after.{name}"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(head.eval()(features["features"])[:, 0], tensors["head.out.eval"], rtol=1e-6, atol=1e-6)


def test_losses_give_the_published_numbers():
    _, tensors = golden("beyond_rae")
    real, fake = tensors["loss.in.real"], tensors["loss.in.fake"]
    for name, value in (
        ("hinge", hinge(real, fake)),
        ("vanilla_d", vanilla(real, fake)),
        ("generator", generator_loss(fake)),
    ):
        torch.testing.assert_close(value, tensors[f"loss.out.{name}"], rtol=1e-10, atol=1e-10)


def test_the_largest_singular_value_comes_to_one():
    torch.manual_seed(0)
    layer, one_position_each = SpectralConv1d(6, 5, 1), torch.eye(6)[None]
    for _ in range(200):
        layer(one_position_each)
        layer.advance()
    weight = (layer.eval()(one_position_each) - layer.bias[:, None])[0]
    assert torch.linalg.svdvals(weight)[0].item() == pytest.approx(1, rel=1e-4)


def test_published_sizes():
    """DINO ViT-S/8 at 224 px: five heads, on 28 x 28 tokens of 384 channels each."""
    config = AdversarialLossConfig(kind="features")
    with torch.device("meta"):
        heads = build_discriminator(config)
        network = FrozenFeatures(config.features, meta_backbone)
        features = network(torch.zeros(2, 3, 256, 256))
    assert [tuple(each.shape) for each in features] == [(2, 384, 784)] * 5
    head = 384**2 + 9 * 384**2 + 384 + 2 * 3 * 384 + 1
    assert sum(parameter.numel() for parameter in heads.parameters()) == 5 * head


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "features", "layers": 2}, "kind 'features' reads no layers: leave it out"),
        ({"kind": "features", "norm": "group"}, "kind 'features' reads no norm: leave it out"),
        ({"features": {"kernel": 3}}, "kind 'patch' reads no features: leave it out"),
        ({"kind": "features", "features": {"kernel": 4}}, "kernel 4: take an odd number"),
    ],
)
def test_what_is_of_the_other_kind_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        AdversarialLossConfig.model_validate(fields)


def test_layers_that_are_not_there_are_refused():
    assert len(feature_dims(CONFIG)) == 4
    with pytest.raises(UserError, match=r"features\.layers=\[7\], but efficientnet_lite0 has 5, counted from 0"):
        feature_dims(CONFIG.model_copy(update={"layers": (7,)}))


def test_frozen_features_pass_gradients_to_images_alone():
    network = FrozenFeatures(CONFIG)
    images = torch.rand(2, 3, 24, 16, generator=torch_generator(0, "images")).requires_grad_()
    features = network(images)
    assert torch.equal(features[0], features[3])
    assert [each.shape[1] for each in features] == feature_dims(CONFIG)
    sum(each.square().sum() for each in features).backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def test_augmentation_gives_the_published_numbers():
    spec, tensors = golden("beyond_rae")
    augmentation = Augmentation(True, True, True, tensors["aug.in.uniform"], spec["cutout"])
    torch.testing.assert_close(augmentation.apply(tensors["aug.in.x"]), tensors["aug.out.x"], rtol=1e-6, atol=1e-6)


def test_augmentation_is_differentiable_and_nothing_where_no_coin_falls():
    images = torch.rand(2, 3, 16, 24, generator=torch_generator(0, "images")).requires_grad_()
    drawn = Augmentation.draw(AugmentConfig(cutout=0.5), len(images), torch_generator(0, "augment"))
    assert drawn is not None
    # An affine map: its differences are its derivative's.
    direction, weight = torch.randn(2, *images.shape, generator=torch_generator(1, "images"))
    augmented = drawn.apply(images)
    (gradient,) = torch.autograd.grad(augmented, images, weight)
    difference = (drawn.apply(images + direction) - augmented) * weight
    assert difference.sum().item() == pytest.approx((gradient * direction).sum().item(), rel=1e-3, abs=1e-3)
    assert gradient.abs().sum() > 0
    none = drawn._replace(translates=False, recolors=False, cuts=False)
    assert torch.equal(none.apply(images), images)
    assert Augmentation.draw(None, 2, torch_generator(0, "augment")) is None
    rare = AugmentConfig(probability=1e-9)
    assert Augmentation.draw(rare, 2, torch_generator(0, "augment"))[:3] == (False, False, False)
    coins = [
        Augmentation.draw(AugmentConfig(probability=0.5), 1, torch_generator(i, "augment"))[:2] for i in range(400)
    ]
    assert sum(map(sum, coins)) / 800 == pytest.approx(0.5, abs=0.09)


def test_reconstructions_are_seen_as_files_hold_them():
    objective = DiscriminatorObjective(AdversarialLossConfig(kind="features", features=CONFIG))
    network, seen = FrozenFeatures(CONFIG), []

    def view(images):
        seen.append(images)
        return network(images)

    images = torch.linspace(-1.2, 1.2, 3 * 64 * 64).view(1, 3, 64, 64)
    terms = objective(images, images.clone().requires_grad_(), (view, view))
    assert torch.equal(seen[0], images)
    assert not seen[1].requires_grad
    assert (seen[1].min(), seen[1].max(), len(seen[1].unique())) == (-1, 1, 256)
    torch.testing.assert_close(seen[1], images.clamp(-1, 1), rtol=0, atol=0.51 / 127.5)
    terms.objective.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
