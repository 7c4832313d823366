"""The laws of the timesteps, by their moments."""

import math

import pytest
import torch
from pydantic import ValidationError
from support.golden import golden

from vavae.diffusion.config import SolverConfig, TimestepConfig
from vavae.diffusion.flow_matching import sample_timesteps
from vavae.diffusion.shift import shift_times
from vavae.diffusion.solvers import time_grid

N = 100_000


def draw(config, images_seen=0, seed=0, dimension=4096):
    return sample_timesteps(config, N, images_seen, torch.Generator().manual_seed(seed), dimension)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.0, 0.5)])
def test_logit_normal_timesteps_have_normal_logits(mean, std):
    t = draw(TimestepConfig(mean=mean, std=std))
    logits = torch.logit(t.double())
    assert t.dtype == torch.float32
    assert logits.mean() == pytest.approx(mean, abs=5 * std / N**0.5)
    assert logits.std() == pytest.approx(std, abs=5 * std / (2 * N) ** 0.5)
    within = ((logits - mean).abs() < std).double().mean()
    assert within == pytest.approx(0.6827, abs=5 * 0.4654 / N**0.5)  # the share of a normal within one deviation


def test_a_positive_mean_leans_towards_the_data():
    assert draw(TimestepConfig(mean=1.0)).mean() > 0.6


def test_uniform_timesteps_fill_the_interval_evenly():
    t = draw(TimestepConfig(law="uniform"))
    counts = torch.histc(t, 10, 0, 1)
    assert counts.sum() == N
    assert (counts - N / 10).abs().max() < 5 * (N * 0.09) ** 0.5


def test_the_law_turns_uniform_from_the_stated_image_on():
    config = TimestepConfig(uniform_after_images=1000)
    assert torch.equal(draw(config, images_seen=999), draw(TimestepConfig()))
    assert torch.equal(draw(config, images_seen=1000), draw(TimestepConfig(law="uniform")))


@pytest.mark.parametrize("law", ["logit_normal", "uniform"])
def test_draws_come_from_the_generator_alone(law):
    config = TimestepConfig(law=law)
    before = torch.get_rng_state()
    assert torch.equal(draw(config), draw(config))
    assert not torch.equal(draw(config), draw(config, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("law", ["logit_normal", "uniform"])
@pytest.mark.parametrize(("shift", "dimension", "factor"), [(0.3, 1, 0.3), ("by_dimension", 32 * 16 * 16, 0.5**0.5)])
def test_shifted_timesteps_have_the_closed_form_of_the_law(law, shift, dimension, factor):
    t = draw(TimestepConfig(law=law, shift=shift), dimension=dimension).double()
    for share in (0.1, 0.5, 0.9):
        drawn = share if law == "uniform" else math.erf(math.sqrt(2) * share - math.sqrt(0.5)) / 2 + 0.5
        quantile = share if law == "uniform" else 1 / (1 + math.exp(1 - 2 * share))  # of a drawn t at this share
        below = (t < factor * quantile / (1 + (factor - 1) * quantile)).double().mean()
        assert below == pytest.approx(drawn, abs=5 * 0.5 / N**0.5)
    # Shifted back it is what the law drew; a logit moves by log s.
    back = shift_times(t, 1 / factor, dimension)
    torch.testing.assert_close(back, draw(TimestepConfig(law=law)).double(), rtol=1e-5, atol=1e-6)
    inner = (back > 1e-3) & (back < 1 - 1e-3)
    moved = torch.logit(t[inner]) - torch.logit(back[inner])
    torch.testing.assert_close(moved, torch.full_like(moved, math.log(factor)))


@pytest.mark.parametrize("law", ["logit_normal", "uniform"])
def test_a_shift_of_one_changes_no_bit(law):
    law = TimestepConfig(law=law)
    assert torch.equal(draw(law), draw(TimestepConfig(law=law.law, shift="by_dimension")))
    rng = torch.Generator().manual_seed(0)
    drawn = torch.rand(N, generator=rng) if law.law == "uniform" else torch.sigmoid(torch.randn(N, generator=rng))
    assert torch.equal(draw(law), drawn)


def test_training_and_sampling_shift_alike_and_as_the_public_code_in_its_time():
    spec, tensors = golden("beyond_x_prediction")
    drawn, shift = 1 - tensors["in.noise_level_unshifted"], 1 / spec["shift_of_noise_level"]
    for factor in (shift, "by_dimension"):
        shifted = shift_times(drawn, factor, spec["dimension"])
        torch.testing.assert_close(1 - shifted, tensors["out.noise_level_shifted"], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(shifted, tensors["in.t"], rtol=1e-10, atol=1e-10)
        grid = time_grid(SolverConfig(num_steps=spec["steps"], shift=factor), spec["dimension"])
        torch.testing.assert_close(grid.double(), tensors["sample.t"], rtol=1e-6, atol=1e-7)


def test_shifted_timesteps_end_at_the_data():
    t = draw(TimestepConfig(mean=20, shift=0.0013))
    assert t.max() == 1


@pytest.mark.parametrize("shift", [0, -1, "by_size"])
def test_a_shift_is_a_positive_number_or_by_dimension(shift):
    with pytest.raises(ValidationError, match="shift"):
        TimestepConfig(shift=shift)


def test_a_deviation_of_zero_is_refused():
    with pytest.raises(ValidationError, match="greater than 0"):
        TimestepConfig(std=0)
