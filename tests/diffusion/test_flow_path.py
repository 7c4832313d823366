"""The path and its direction: t = 0 is noise, t = 1 is data."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vavae.diffusion.flow_matching import LinearPath

DATA, NOISE = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def test_the_ends_are_exactly_noise_and_data():
    assert torch.equal(LinearPath.sample(DATA, NOISE, torch.zeros(3)).x_t, NOISE)
    assert torch.equal(LinearPath.sample(DATA, NOISE, torch.ones(3)).x_t, DATA)


def test_the_velocity_points_from_noise_to_data():
    assert torch.equal(LinearPath.sample(DATA, NOISE, torch.rand(3)).velocity, DATA - NOISE)


@settings(deadline=None)
@given(t=st.floats(0, 1, width=32), step=st.floats(0, 1, width=32))
def test_following_the_velocity_stays_on_the_path(t, step):
    start = LinearPath.sample(DATA, NOISE, torch.full((3,), t))
    end = LinearPath.sample(DATA, NOISE, torch.full((3,), t + step * (1 - t)))
    torch.testing.assert_close(start.x_t + step * (1 - t) * start.velocity, end.x_t, atol=1e-5, rtol=1e-5)


def test_each_sample_has_its_own_time():
    t = torch.tensor([0.0, 0.25, 1.0])
    x_t = LinearPath.sample(DATA, NOISE, t).x_t
    torch.testing.assert_close(x_t[1], 0.25 * DATA[1] + 0.75 * NOISE[1])
    assert torch.equal(x_t[0], NOISE[0])
    assert torch.equal(x_t[2], DATA[2])
