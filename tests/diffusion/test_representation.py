"""Alignment of an inner block's tokens with features of a teacher: REPA and iREPA."""

import pytest
import torch
from support.golden import golden

from vavae.config.load import load
from vavae.diffusion.config import RepresentationConfig
from vavae.diffusion.representation import RepresentationAlignment, normalize_spatially
from vavae.errors import UserError
from vavae.runs.config import RunConfig

SPEC, TENSORS = golden("beyond_repa")
WITH_FEATURES = ["latents.features={teacher: {name: efficientnet_lite0}}", "objective.representation.after_block=3"]


def released(name, **config):
    """The alignment of the fixture, with its weights."""
    dim = TENSORS["in.tokens"].shape[2]
    alignment = RepresentationAlignment(RepresentationConfig(**config), dim, SPEC["teacher_dim"], SPEC["grid"]).double()
    prefix = f"{name}.state."
    state = {key.removeprefix(prefix): tensor for key, tensor in TENSORS.items() if key.startswith(prefix)}
    alignment.load_state_dict(state)
    return alignment


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("repa", {"projector_width": SPEC["projector_width"]}),
        ("irepa", {"projector": "conv", "spatial_norm": SPEC["alpha"]}),
    ],
)
def test_projections_losses_and_gradients_equal_the_public_implementation(name, config):
    alignment, tokens = released(name, **config), TENSORS["in.tokens"].clone().requires_grad_()
    features = TENSORS["in.teacher"].clone().requires_grad_()

    def assert_equal(found, tensor):
        torch.testing.assert_close(found, TENSORS[f"{name}.out.{tensor}"], rtol=1e-10, atol=1e-10)

    assert_equal(alignment.project(tokens), "projected")
    if name == "irepa":
        assert_equal(alignment.target(features), "target")
    loss = alignment(tokens, features.detach())
    assert_equal(loss, "loss")
    loss.backward()
    assert_equal(tokens.grad, "grad_tokens")
    assert_equal(torch.stack([parameter.grad.norm() for parameter in alignment.parameters()]), "grad_norms")


def test_equal_directions_are_aligned_and_shuffled_images_are_less():
    alignment, tokens = released("repa", projector_width=SPEC["projector_width"]), TENSORS["in.tokens"]
    features = alignment.project(tokens).detach()
    torch.testing.assert_close(alignment(tokens, 3 * features).item(), -1.0, rtol=0, atol=1e-12)
    assert alignment(tokens, features.flip(1)) > alignment(tokens, features)
    assert alignment(tokens, features.bfloat16()).item() == pytest.approx(-1, abs=1e-4)
    large = (1e4 * features).half()  # whose squares float16 can't hold
    assert alignment.float()(tokens.float(), large).item() == pytest.approx(-1, abs=1e-4)


def test_normalized_features_have_a_deviation_of_one_and_a_share_of_their_mean():
    features = TENSORS["in.teacher"]
    found, std = normalize_spatially(features, 0.6), features.std(1)
    torch.testing.assert_close(found.std(1), torch.ones_like(std), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.mean(1), 0.4 * features.mean(1) / std, rtol=1e-5, atol=0)


def test_without_features_all_parameters_have_a_gradient_of_zero_and_tokens_none():
    alignment, tokens = released("irepa", projector="conv"), TENSORS["in.tokens"].clone().requires_grad_()
    loss = alignment(tokens, None)
    loss.backward()
    assert loss == 0
    assert tokens.grad is None
    assert all(parameter.grad.eq(0).all() for parameter in alignment.parameters())


def test_the_weight_is_constant_then_falls_and_stops():
    falling = RepresentationConfig(weight=0.8, decay_from_images=100, stop_images=300)
    assert [falling.weight_at(seen) for seen in (0, 100, 150, 200, 299, 300, 500)] == pytest.approx(
        [0.8, 0.8, 0.6, 0.4, 0.004, 0, 0]
    )
    stopping = RepresentationConfig(stop_images=300)
    assert [stopping.weight_at(seen) for seen in (0, 299, 300)] == [0.5, 0.5, 0]
    assert RepresentationConfig().weight_at(10**9) == 0.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.representation={}"], r"with features of the images: give latents.features, such as"),
        ([*WITH_FEATURES, "latents.features.patch_size=2"], r"patch_size=2, but lightningdit.patch_size=1: .* set it"),
        ([*WITH_FEATURES, "latents.features.patch_size=3"], r"latents.features.patch_size=3 does not divide the"),
        ([*WITH_FEATURES, "objective.representation.after_block=99"], r"after_block=99 exceeds the depth of the"),
        ([*WITH_FEATURES, "objective.representation.decay_from_images=9"], r"must be less than stop_images=None"),
        (
            [*WITH_FEATURES, "objective.representation.projector=conv", "objective.representation.projector_width=9"],
            r"projector=conv has no width",
        ),
    ],
)
def test_what_cannot_be_aligned_is_refused_in_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load(RunConfig, "quickstart", overrides)
    assert "\n" not in str(caught.value)
    assert load(RunConfig, "quickstart", WITH_FEATURES).objective.representation.after_block == 3
