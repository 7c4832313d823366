"""Noise, sizes and orientations of latents: published numbers, closed forms, and nothing where they are off."""

from collections import Counter

import pytest
import torch
from support.golden import golden, golden_state
from torch import Tensor, nn

from vavae.losses.config import EquivarianceConfig, LatentNoiseConfig
from vavae.losses.latents import UNTRANSFORMED, LatentNoise, MicroBatchTransforms, Transform
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TokenizerConfig
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


def test_transforms_give_the_published_numbers():
    spec, tensors = golden("beyond_eqvae")
    sizes = spec["ddconfig"]
    config = TokenizerConfig(
        latent_dim=spec["embed_dim"],
        channels=sizes["ch"],
        channel_multipliers=tuple(sizes["ch_mult"]),
        res_blocks=sizes["num_res_blocks"],
        attention_levels=(),
    )
    model = VAVAE(config).double()
    model.load_state_dict(golden_state(tensors))
    side = tensors["out.z"].shape[-1]
    with torch.no_grad():
        for index, case in enumerate(spec["cases"]):
            cells = round(case["scale"] * side)
            transform = Transform((cells, cells), case["quarter_turns"])
            z, target = transform.apply(tensors["out.z"]), transform.apply(tensors["in.x"], config.downsample)
            found = {"z": z, "target": target, "reconstruction": model.decode(z)}
            found["l1"] = (target - found["reconstruction"]).abs().mean()
            for name, value in found.items():
                torch.testing.assert_close(value, tensors[f"case.{index}.{name}"], rtol=1e-10, atol=1e-10)
        cells = round(spec["prior_scale"] * side)
        small = Transform((cells, cells)).apply(tensors["in.x"], config.downsample)
        torch.testing.assert_close(small, tensors["prior.x"], rtol=1e-10, atol=1e-10)


class Nearest(nn.Module):
    """A decoder that is equivariant: a 1x1 convolution, and each position as 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.colors = nn.Conv2d(4, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.interpolate(self.colors(z), scale_factor=2.0, mode="nearest")


@pytest.mark.parametrize("grid", [(8, 8), (4, 6)])
def test_an_equivariant_decoder_loses_nothing(grid):
    """Images of one color per latent row and column, of which bilinear halves and turns know the values."""
    z = torch.randn(2, 4, *grid, generator=torch_generator(0, "latents"))
    decoder = Nearest()
    images = decoder(z)
    for turns in range(4):
        turned = Transform(grid, turns)
        assert turned.apply(z).shape[2:] == turned.turned_grid
        assert torch.equal(turned.apply(images, 2), decoder(turned.apply(z)))
    half = Transform((grid[0] // 2, grid[1] // 2), 1)
    smaller = decoder(half.apply(z))
    assert smaller.shape == half.apply(images, 2).shape
    # Each half position is a mean of four; each pixel of the half image too, of pixels of one or two positions.
    pooled = torch.rot90(nn.functional.avg_pool2d(z, 2), 1, dims=(-1, -2))
    torch.testing.assert_close(half.apply(z), pooled)
    torch.testing.assert_close(smaller.mean(dim=(2, 3)), half.apply(images, 2).mean(dim=(2, 3)))


def test_a_turn_is_clockwise():
    picture = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    assert Transform((2, 2), 1).apply(picture)[0, 0].tolist() == [[3.0, 1.0], [4.0, 2.0]]


@pytest.mark.parametrize(("grid", "least", "sides"), [((16, 16), 0.25, 12), ((32, 32), 0.25, 24), ((4, 6), 0.5, 1)])
def test_scales_leave_whole_positions(grid, least, sides):
    grids = EquivarianceConfig(min_scale=least).grids(grid)
    assert len(grids) == sides
    assert all(height * grid[1] == width * grid[0] for height, width in grids)
    assert grids[0] == tuple(round(side * least) for side in grid)


def test_draws_have_their_shares_and_follow_the_key():
    config, count = EquivarianceConfig(min_scale=0.5), 2000

    def draw(index: int, config: EquivarianceConfig | None = config) -> MicroBatchTransforms:
        return MicroBatchTransforms.draw(config, (8, 8), torch_generator(0, "draw", index))

    drawn = [draw(index) for index in range(count)]
    assert drawn == [draw(index) for index in range(count)]
    sizes = [Transform((side, side)) for side in (4, 5, 6, 7)]
    shares = {MicroBatchTransforms(latents=each): 0.5 / 4 for each in sizes}
    shares |= {MicroBatchTransforms(images=each): 0.5 * 0.25 / 4 for each in sizes}
    shares[UNTRANSFORMED] = 0.5 * 0.75
    found = Counter(each._replace(latents=each.latents and each.latents._replace(quarter_turns=0)) for each in drawn)
    assert found.keys() == shares.keys()
    for outcome, share in shares.items():
        assert found[outcome] / count == pytest.approx(share, abs=5 * (share / count) ** 0.5)
    turns = Counter(each.latents.quarter_turns for each in drawn if each.latents is not None)
    assert turns.keys() == {1, 2, 3}
    assert draw(0, None) == draw(0, EquivarianceConfig(probability=0, small_images=0)) == UNTRANSFORMED
    plain = EquivarianceConfig(probability=1, turns=False)
    assert {draw(index, plain).latents.quarter_turns for index in range(9)} == {0}
