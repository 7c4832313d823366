"""The laws of the timesteps, by their moments."""

import pytest
import torch
from pydantic import ValidationError

from vavae.diffusion.config import TimestepConfig
from vavae.diffusion.flow_matching import sample_timesteps

N = 100_000


def draw(config, images_seen=0, seed=0):
    return sample_timesteps(config, N, images_seen, torch.Generator().manual_seed(seed))


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


def test_a_deviation_of_zero_is_refused():
    with pytest.raises(ValidationError, match="greater than 0"):
        TimestepConfig(std=0)
