"""Generated images: functions of seed, index, label and models, whatever they are computed beside."""

import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from support import image_shards, small_models
from support.trained_run import DIGEST, MEAN, STD, trained_run

from vavae.data.pixels import to_pixels
from vavae.diffusion.config import GuidanceConfig, SolverConfig
from vavae.errors import UserError
from vavae.latents.statistics import LatentNormalizer
from vavae.models.dit.config import RoutingConfig
from vavae.models.dit.model import LightningDiT
from vavae.randomness import torch_generator
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.sampling.sampler import Sampler, noise_of, spherical

GUIDED, PLAIN, SOLVER = GuidanceConfig(scale=6), GuidanceConfig(), SolverConfig(num_steps=3)
SOLVERS = [SOLVER, SolverConfig(name="heun", num_steps=2, shift="by_dimension"), SolverConfig(name="dopri5")]
INDICES, LABELS, SEED = [0, 1, 5, 9, 400_000], [0, 1, 2, 0, 1], 7
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sampler():
    return Sampler(small_models.tokenizer(), small_models.lightningdit(), LatentNormalizer(MEAN, STD))


@pytest.fixture(scope="module")
def images(sampler):
    return sampler.images(INDICES, LABELS, SEED, GUIDED, SOLVER)


def test_images_are_bytes_that_differ(images):
    assert images.dtype == torch.uint8
    assert images.shape == (5, 3, image_shards.SIZE, image_shards.SIZE)
    assert len({image.numpy().tobytes() for image in images}) == 5
    assert images.float().std() > 1


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
@pytest.mark.parametrize("guidance", [GUIDED, GuidanceConfig(scale=6, interval=(0.2, 0.7), channels=3)])
def test_the_batch_an_image_is_in_does_not_matter(sampler, solver, guidance):
    whole = sampler.images(INDICES, LABELS, SEED, guidance, solver)
    for batch_size in (1, 2, 4):
        pieces = [
            sampler.images(INDICES[i : i + batch_size], LABELS[i : i + batch_size], SEED, guidance, solver)
            for i in range(0, len(INDICES), batch_size)
        ]
        assert (torch.cat(pieces).int() - whole.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("fuse", "guidance", "error"),
    [
        (None, {"routing_scale": 2}, "routing_scale=2, but the LightningDiT was trained without lightningdit"),
        ({}, {"path_drop": True}, r"path_drop=true, but the LightningDiT has no lightningdit\.routing\.fuse"),
    ],
)
def test_guidance_by_routing_or_path_drop_is_that_of_the_image(sampler, fuse, guidance, error):
    routing = RoutingConfig(first_block=0, last_block=0, drop=0.5, fuse=fuse)
    config = small_models.LIGHTNINGDIT.model_copy(update={"routing": routing})
    routed = small_models.randomized(LightningDiT(config, small_models.TOKENIZER.latent_dim, small_models.GRID), 0.3)
    guidance, plain = GuidanceConfig(scale=2, **guidance), GuidanceConfig(scale=2)
    with pytest.raises(UserError, match=error):
        sampler.images(INDICES, LABELS, SEED, guidance, SOLVER)
    sampler = replace(sampler, lightningdit=routed)
    whole = sampler.images(INDICES, LABELS, SEED, guidance, SOLVER)
    assert not torch.equal(whole, sampler.images(INDICES, LABELS, SEED, plain, SOLVER))
    for i, label in enumerate(LABELS):
        alone = sampler.images(INDICES[i : i + 1], [label], SEED, guidance, SOLVER)
        assert (alone.int() - whole[i : i + 1].int()).abs().max() <= 1


def test_solvers_agree_where_their_steps_are_fine(sampler):
    """Dopri5 against Heun on a grid, across the ends of an interval."""
    guidance, fine = GuidanceConfig(scale=2, interval=(0.2, 0.7)), SolverConfig(name="heun", num_steps=200)
    images = [sampler.images(INDICES, LABELS, SEED, guidance, solver) for solver in (SolverConfig(name="dopri5"), fine)]
    assert (images[0].int() - images[1].int()).abs().max() <= 2


def spoiled(sampler, part, name):
    """The sampler with a NaN in a tensor of a part."""
    model = deepcopy(getattr(sampler, part))
    model.state_dict()[name].view(-1)[0] = torch.nan
    return replace(sampler, **{part: model})


@pytest.mark.parametrize(
    ("part", "name", "place"),
    [
        ("lightningdit", "x_embedder.proj.weight", "weights of the LightningDiT: x_embedder.proj.weight[0, 0, 0, 0]"),
        ("tokenizer", "decoder.conv_in.bias", "weights of the tokenizer: decoder.conv_in.bias[0]"),
        ("normalizer", "std", "statistics of the latents: std[0]"),
    ],
)
def test_black_images_are_none_and_say_where_they_come_from(sampler, part, name, place):
    with pytest.raises(UserError, match=rf"^{re.escape(place)} is nan: "):
        spoiled(sampler, part, name).images(INDICES, LABELS, SEED, PLAIN, SOLVER)


@pytest.mark.parametrize(
    ("part", "method", "cause"),
    [
        ("lightningdit", "_unpatchify", "LightningDiT's latent is not finite"),
        ("tokenizer", "decode", "decoder overflows"),
    ],
)
def test_an_image_that_overflows_from_finite_weights_is_named(sampler, monkeypatch, part, method, cause):
    honest = getattr(getattr(sampler, part), method)

    def overflowing(x, *rest):
        found = honest(x, *rest).clone()
        found[2] = torch.inf
        return found

    monkeypatch.setattr(getattr(sampler, part), method, overflowing)
    with pytest.raises(
        UserError, match=rf"^sample 5: the .*{cause}, though all weights are finite: set sample.precisi"
    ):
        sampler.images(INDICES, LABELS, SEED, PLAIN, SOLVER)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_noise_is_the_same_to_the_last_bit_in_every_batch(batch_size):
    shape = (4, 3, 3)
    whole = noise_of(INDICES, shape, SEED)
    pieces = [noise_of(INDICES[i : i + batch_size], shape, SEED) for i in range(0, len(INDICES), batch_size)]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(noise_of(INDICES[::-1], shape, SEED).flip(0), whole)
    assert not torch.equal(noise_of(INDICES, shape, SEED + 1), whole)


def test_noise_is_unit_gaussian():
    noise = noise_of(range(200), (4, 10, 10), SEED)
    assert noise.mean().abs() < 5 / noise.numel() ** 0.5
    assert noise.std() == pytest.approx(1, abs=5 / (2 * noise.numel()) ** 0.5)


def test_batches_are_the_images_in_order(sampler, images):
    batches = list(sampler.batches(INDICES, LABELS, SEED, GUIDED, SOLVER, 2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert (torch.cat(batches).int() - images.int()).abs().max() <= 1


def test_index_label_seed_and_guidance_matter(sampler, images):
    def one(index=0, label=0, seed=SEED, guidance=GUIDED):
        return sampler.images([index], [label], seed, guidance, SOLVER)[0].int()

    assert (one() - images[0].int()).abs().max() <= 1
    for other in (one(index=1), one(label=1), one(seed=8), one(guidance=PLAIN)):
        assert (other - one()).abs().max() > 5


def test_an_image_is_the_decoded_solution_in_the_tokenizers_units(sampler):
    """Euler in one step from noise: x = noise + velocity(noise, 0), then denormalized and decoded."""
    shape = (small_models.TOKENIZER.latent_dim, small_models.GRID, small_models.GRID)
    noise = torch.randn(shape, generator=torch_generator(SEED, "sample", 3))[None]
    velocity = sampler.lightningdit(noise, torch.zeros(1), torch.tensor([2]))
    latent = (noise + velocity) * STD.float()[:, None, None] + MEAN.float()[:, None, None]
    expected = to_pixels(sampler.tokenizer.decode(latent))
    found = sampler.images([3], [2], SEED, PLAIN, SolverConfig(num_steps=1))
    assert (found.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
def test_half_precision_moves_a_pixel_by_a_small_part_of_the_spread(sampler, solver):
    """Seen here 1.1 to 1.4 % of it (root mean square), which is 0.3 to 0.4 of 255 levels on average."""
    half = replace(sampler, precision="bf16")
    single, other = (each.images(INDICES, LABELS, SEED, GUIDED, solver).float() for each in (sampler, half))
    error = (other - single).square().mean().sqrt() / single.std()
    assert 1e-4 < error < 0.03


def test_the_layers_compute_in_the_precision_and_the_solver_in_single(sampler, monkeypatch):
    layers, states, decode = set(), set(), type(sampler.tokenizer).decode
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: layers.add(output.dtype))
        for module in (sampler.lightningdit.final_layer.linear, sampler.tokenizer.decoder.conv_in)
    ]
    monkeypatch.setattr(type(sampler.tokenizer), "decode", lambda model, z: states.add(z.dtype) or decode(model, z))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        layers.clear()
        replace(sampler, precision=precision).images(INDICES, LABELS, SEED, GUIDED, SOLVER)
        assert layers == {dtype}
    assert states == {torch.float32}
    for hook in hooks:
        hook.remove()


@pytest.fixture
def stored(tmp_path):
    """Both exports and the statistics on storage."""
    return SamplingInputs.of(trained_run(tmp_path))


def test_a_sampler_from_storage_generates_the_same_images(stored, images):
    loaded = Sampler.load(stored, CPU)
    assert torch.equal(loaded.images(INDICES, LABELS, SEED, GUIDED, SOLVER), images)


def test_a_lightningdit_of_another_tokenizer_is_refused(stored):
    other = replace(stored, tokenizer=replace(stored.tokenizer, digest="b" * 64))
    with pytest.raises(
        UserError, match=rf"export was trained on latents of tokenizer {DIGEST[:12]}, but .*export is {'b' * 12}"
    ):
        Sampler.load(other, CPU)


def test_noise_between_two_is_on_the_great_circle():
    first, last = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    found = spherical(first, last, torch.tensor([0, 1 / 3, 0.5, 1]))
    angles = torch.tensor([0, torch.pi / 6, torch.pi / 4, torch.pi / 2])
    torch.testing.assert_close(found, 3 * torch.stack([angles.cos(), angles.sin()], 1)[:, None])
    noise = noise_of([0, 1], (4, 5, 6), SEED)
    ends = spherical(*noise, torch.linspace(0, 1, 7))[[0, -1]]
    assert ends.equal(noise)
    assert spherical(first, first, torch.linspace(0, 1, 3)).equal(first.expand(3, 1, 2))
