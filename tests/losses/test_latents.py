"""Noise on latents: the published formulas, its moments, and none where it is off."""

import pytest
import torch
from support.golden import golden

from vavae.losses.config import LatentNoiseConfig
from vavae.losses.latents import LatentNoise
from vavae.randomness import torch_generator


def draw(config: LatentNoiseConfig, *shape: int) -> LatentNoise:
    drawn = LatentNoise.draw(config, shape, torch_generator(0, "noise"))
    assert drawn is not None
    return drawn


def test_interpolation_gives_the_published_numbers():
    spec, tensors = golden("beyond_ldetok")
    config = LatentNoiseConfig(scale=spec["gamma"])
    drawn = LatentNoise(config, tensors["in.noise_level"][:, None], tensors["in.noise"][:, None])
    noised = drawn.apply(tensors["out.z_clean"][:, None])
    torch.testing.assert_close(noised[:, 0], tensors["out.z_noised"], rtol=1e-10, atol=1e-10)


def test_addition_gives_the_published_numbers():
    """The fixture normalizes afterwards."""
    spec, tensors = golden("beyond_rae")
    side = tensors["noise.out.latent"].shape[-1]
    eps = tensors["noise.in.eps"].transpose(1, 2).unflatten(2, (side, side))
    drawn = LatentNoise(LatentNoiseConfig(kind="add", scale=spec["tau"]), tensors["noise.in.uniform"][..., None], eps)
    clean = tensors["layers.out"].transpose(1, 2).unflatten(2, (side, side))
    noised = (drawn.apply(clean) - tensors["stats.mean"]) / (tensors["stats.var"] + spec["eps"]).sqrt()
    torch.testing.assert_close(noised, tensors["noise.out.latent"], rtol=1e-10, atol=1e-10)


def test_moments():
    """E z' = z / 2 and Var z' = z² / 12 + scale² / 3 interpolated, z and scale² / 3 added."""
    z, count = 1.5, 40_000
    latents = torch.full((count, 2, 2, 2), z)
    for kind, mean, variance in (("interpolate", z / 2, z**2 / 12 + 4 / 3), ("add", z, 4 / 3)):
        noised = draw(LatentNoiseConfig(kind=kind, scale=2.0), *latents.shape).apply(latents)
        assert noised.mean().item() == pytest.approx(mean, abs=0.02)
        assert noised.var().item() == pytest.approx(variance, rel=0.02)


def test_an_image_has_one_level_and_level_0_is_no_noise():
    drawn = draw(LatentNoiseConfig(), 5, 4, 3, 2)
    assert drawn.level.shape == (5, 1, 1, 1)
    assert len(drawn.level.unique()) == 5
    assert (drawn.level >= 0).all()
    assert (drawn.level < 1).all()
    z = torch.randn(5, 4, 3, 2, generator=torch_generator(1, "latents"))
    assert torch.equal(drawn._replace(level=torch.zeros(5, 1, 1, 1)).apply(z), z)


def test_without_noise_nothing_is_drawn():
    rng = torch_generator(0, "noise")
    before = rng.get_state()
    for config in (None, LatentNoiseConfig(scale=0)):
        assert LatentNoise.draw(config, (2, 4, 3, 3), rng) is None
    assert torch.equal(rng.get_state(), before)
