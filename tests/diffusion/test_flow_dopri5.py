"""The adaptive solver: SciPy's step for step, closed forms, orders, and images that know nothing of each other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from vavae.diffusion.config import GuidanceConfig, SolverConfig
from vavae.diffusion.dopri5 import Tolerance, _try, dopri5
from vavae.diffusion.guidance import ClassifierFreeGuidance
from vavae.diffusion.solvers import solve
from vavae.errors import UserError

IMAGES, SHAPE = 5, (2, 3, 3)
NOISE = torch.randn(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(IMAGES)


def pendulums(x, t, y):
    """Stiffer and faster with the label, so that each image needs other steps."""
    t, y = (value.to(x.dtype).view(-1, 1, 1, 1) for value in (t, y))
    return (1 + y) * torch.sin(3 * x + 2 * t * y) - 0.5 * x


class Counted:
    """A velocity that counts how often each label was evaluated."""

    def __init__(self, velocity):
        self.velocity, self.counts = velocity, torch.zeros(IMAGES, dtype=torch.int64)

    def __call__(self, x, t, y):
        self.counts += torch.bincount(y, minlength=IMAGES)
        return self.velocity(x, t, y)


def by_scipy(image, method, rtol, atol, span=(0, 1), start=None, factor=1):
    """SciPy's solution of one image by itself."""
    label = LABELS[image : image + 1]

    def velocity(t, x):
        return factor * pendulums(torch.from_numpy(x).view(1, *SHAPE), torch.tensor([t]), label).flatten().numpy()

    start = NOISE[image].flatten().numpy() if start is None else start
    return solve_ivp(velocity, span, start, method, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("rtol", "atol"), [(1e-3, 1e-6), (1e-8, 1e-10)])
def test_each_image_takes_the_very_steps_that_scipy_takes_for_it_alone(rtol, atol):
    velocity = Counted(pendulums)
    found = dopri5(velocity, NOISE, LABELS, Tolerance(rtol, atol))
    for image in range(IMAGES):
        scipys = by_scipy(image, "RK45", rtol, atol)
        assert velocity.counts[image] == scipys.nfev
        np.testing.assert_allclose(found[image].flatten(), scipys.y[:, -1], rtol=1e-9, atol=1e-11)
    assert len(set(velocity.counts.tolist())) > 1, "the images were to need different numbers of steps"


@pytest.mark.parametrize("rtol", [1e-4, 1e-6, 1e-9])
def test_the_error_follows_the_tolerance(rtol):
    found = dopri5(pendulums, NOISE, LABELS, Tolerance(rtol, rtol * 1e-3))
    truth = np.stack([by_scipy(image, "DOP853", 1e-13, 1e-13).y[:, -1] for image in range(IMAGES)])
    error = np.abs(found.flatten(1).numpy() - truth).max()
    assert rtol / 100 < error < 100 * rtol


def test_linear_systems_have_the_matrix_exponential_for_solution():
    matrices = torch.randn(IMAGES, 18, 18, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def velocity(x, t, y):
        return torch.einsum("bij,bj->bi", matrices[y], x.flatten(1)).view(x.shape)

    found = dopri5(velocity, NOISE, LABELS, Tolerance(1e-10, 1e-12))
    expected = [expm(matrix) @ x for matrix, x in zip(matrices.numpy(), NOISE.flatten(1).numpy(), strict=True)]
    np.testing.assert_allclose(found.flatten(1), expected, rtol=1e-7, atol=1e-8)


def test_a_step_is_of_fifth_order_and_tells_its_error_in_fourth():
    def step(h):
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        t, h = torch.zeros(1, dtype=torch.float64), torch.tensor([h], dtype=torch.float64)
        trial = _try(lambda x, t, y: x, one, one, LABELS[:1], t, h)
        return abs(trial.x.item() - math.exp(h)), abs(trial.error.item())

    (coarse, coarse_estimate), (fine, fine_estimate) = step(0.2), step(0.1)
    assert math.log2(coarse / fine) == pytest.approx(6, abs=0.2)  # the error of one step is an order above the method
    assert math.log2(coarse_estimate / fine_estimate) == pytest.approx(5, abs=0.2)


@settings(deadline=None, max_examples=20)
@given(rows=st.lists(st.integers(0, IMAGES - 1), min_size=1, max_size=2 * IMAGES))
def test_an_image_is_the_same_to_the_last_bit_beside_whatever_others(rows):
    tolerance = Tolerance(1e-3, 1e-6)
    noise = NOISE.float()
    alone = torch.cat([dopri5(pendulums, noise[i : i + 1], LABELS[i : i + 1], tolerance) for i in range(IMAGES)])
    assert torch.equal(dopri5(pendulums, noise[rows], LABELS[rows], tolerance), alone[rows])


def test_no_image_is_evaluated_without_need():
    """Two evaluations to begin with and six for each step, whatever the steps of the others; the guided ones twice."""
    velocity, tolerance = Counted(pendulums), Tolerance(1e-3, 1e-6)
    dopri5(velocity, NOISE, LABELS, tolerance)
    assert ((velocity.counts - 2) % 6 == 0).all()
    model = Counted(lambda x, t, y: pendulums(x, t, torch.zeros_like(y)))
    guidance = ClassifierFreeGuidance(model, IMAGES - 1, GuidanceConfig(scale=2.0))
    dopri5(guidance, NOISE[:2], LABELS[:2], tolerance)
    assert model.counts[IMAGES - 1] == model.counts[:2].sum()


@pytest.mark.parametrize(("interval", "inside"), [((0.3, 0.8), 0.5), ((0.0, 0.1), 0.1), ((0.125, 1.0), 0.875)])
def test_guidance_within_an_interval_is_integrated_up_to_its_ends(interval, inside):
    """v = 3 inside the interval and 1 outside: steps that went across its ends would not notice it."""
    model = Counted(lambda x, t, y: torch.where(y == IMAGES - 1, 0.0, 1.0).view(-1, 1, 1, 1).expand_as(x))
    guidance = ClassifierFreeGuidance(model, IMAGES - 1, GuidanceConfig(scale=3, interval=interval))
    noise = NOISE[:-1].float()
    found = solve(guidance, noise, LABELS[:-1], SolverConfig(name="dopri5"), guidance.jumps)
    torch.testing.assert_close(found, noise + 1 + 2 * inside, atol=1e-5, rtol=1e-5)
    assert model.counts[:-1].max() < 60
    assert 0 < model.counts[-1] < model.counts[:-1].sum()  # no null velocity outside the interval


def test_pieces_between_jumps_are_scipys_too():
    """The pendulums, ten times as fast from t = 0.4 on."""

    def jumping(x, t, y):
        return pendulums(x, t, y) * torch.where(t < 0.4, 1, 10).view(-1, 1, 1, 1)

    found = dopri5(jumping, NOISE, LABELS, Tolerance(1e-8, 1e-10), jumps=[0.4])
    for image in range(IMAGES):
        x = NOISE[image].flatten().numpy()
        for span, factor in (((0, 0.4), 1), ((0.4, 1), 10)):
            x = by_scipy(image, "DOP853", 1e-12, 1e-12, span, x, factor).y[:, -1]
        np.testing.assert_allclose(found[image].flatten(), x, rtol=1e-5, atol=1e-6)


def test_a_silent_model_leaves_the_noise():
    assert torch.equal(dopri5(lambda x, t, y: 0 * x, NOISE.float(), LABELS, Tolerance(1e-3, 1e-6)), NOISE.float())


def test_what_is_given_stays_as_it_is():
    noise, slope = NOISE.clone(), torch.ones_like(NOISE)
    dopri5(lambda x, t, y: slope if not t.any() else x, noise, LABELS, Tolerance(1e-3, 1e-6))
    assert torch.equal(noise, NOISE)
    assert (slope == 1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_velocity_that_is_not_finite_is_one_line(value):
    def velocity(x, t, y):
        return torch.where(t.view(-1, 1, 1, 1) > 0.5, torch.full_like(x, value), x)

    with pytest.raises(UserError, match=r"dopri5 finds no step at t=0\.[45]\d*: the velocity is not finite there"):
        dopri5(velocity, NOISE.float(), LABELS, Tolerance(1e-3, 1e-6))


def test_a_velocity_that_runs_away_is_one_line():
    """dx/dt = x² from 4 has no value at t = 1/4."""
    with pytest.raises(UserError, match=r"no step at t=0\.2[45]\d*: .* changes too fast for solver\.rtol; raise it"):
        dopri5(lambda x, t, y: x**2, torch.full((1, 1, 1, 1), 4.0), LABELS[:1], Tolerance(1e-3, 1e-6))
