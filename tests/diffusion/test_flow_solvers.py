"""Solvers against closed forms, and the guided sampler against the public implementation."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from vavae.diffusion.config import GuidanceConfig, SolverConfig
from vavae.diffusion.guidance import ClassifierFreeGuidance
from vavae.diffusion.solvers import solve, time_grid

NOISE, DATA = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1])
SIZE = NOISE[0].numel()


def config(name="euler", num_steps=8, shift=1.0):
    return SolverConfig(name=name, num_steps=num_steps, shift=shift)


@pytest.mark.parametrize(("start", "unguided"), [(0.1, 68), (0.125, 81), (0.11, 73)])
def test_the_released_interval_leaves_the_published_number_of_steps_unguided(start, unguided):
    samples = 0

    def model(x, t, y):
        nonlocal samples
        samples += len(x)
        return torch.zeros_like(x)

    guidance = ClassifierFreeGuidance(model, 9, GuidanceConfig(scale=10, interval=(start, 1)))
    solve(guidance, NOISE, LABELS, config(num_steps=249, shift=0.3))
    assert samples == (2 * 249 - unguided) * len(NOISE)


def test_guided_sample_equals_the_public_implementation_bit_for_bit():
    with safe_open(Path(__file__).parents[1] / "golden" / "flow_euler.safetensors", "pt") as file:
        spec = json.loads(file.metadata()["spec"])
        weight, noise, labels, expected = (file.get_tensor(f"sampler.{key}") for key in ("W", "noise", "y", "out"))
    null = spec["classes"]

    def model(x, t, y):
        y = y.masked_fill(y == null, spec["null_label_uses_y"]).view(-1, 1, 1, 1)
        return torch.einsum("ij,bjhw->bihw", weight, x) * (1 + 0.1 * y) + t.view(-1, 1, 1, 1)

    released = GuidanceConfig(
        scale=spec["cfg_scale"], interval=(spec["cfg_interval_start"], 1), channels=spec["cfg_channels"]
    )
    solver = config(num_steps=spec["num_points"] - 1, shift=spec["shift"])
    assert torch.equal(solve(ClassifierFreeGuidance(model, null, released), noise, labels, solver), expected)


def test_integration_runs_from_noise_at_zero_to_data_at_one():
    seen = []

    def velocity(x, t, y):
        assert torch.equal(y, LABELS)
        assert (t == t[0]).all()
        seen.append((t[0], x))
        return (DATA - x) / (1 - t[0])  # of the straight path to one known image

    torch.testing.assert_close(solve(velocity, NOISE, LABELS, config()), DATA, atol=1e-5, rtol=0)
    assert seen[0][0] == 0
    assert torch.equal(seen[0][1], NOISE)
    assert [t for t, _ in seen] == sorted(t for t, _ in seen)


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("shift", [1.0, 0.3, "by_dimension"])
def test_a_constant_velocity_is_integrated_exactly(name, shift):
    out = solve(lambda x, t, y: DATA, NOISE, LABELS, config(name, 4, shift))
    torch.testing.assert_close(out, NOISE + DATA, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_heun_is_exact_for_a_velocity_linear_in_time_and_euler_misses_by_half_a_step(num_steps):
    def velocity(x, t, y):
        return torch.full_like(x, 1 + 4 * t[0])  # its integral over [0, 1] is 3

    for name, missing in (("heun", 0.0), ("euler", 2 / num_steps)):
        torch.testing.assert_close(solve(velocity, NOISE, LABELS, config(name, num_steps)), NOISE + 3 - missing)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence_on_exponential_growth(name, order):
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    coarse, fine = (abs(solve(lambda x, t, y: x, x, LABELS, config(name, n)).item() - math.e) for n in (32, 64))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize(("name", "per_step"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize(("scale", "branches"), [(1.0, 1), (2.0, 2)])
def test_number_of_evaluations(name, per_step, scale, branches):
    samples = 0

    def model(x, t, y):
        nonlocal samples
        samples += len(x)
        return x

    solve(
        ClassifierFreeGuidance(model, 9, GuidanceConfig(scale=scale)),
        NOISE,
        LABELS,
        config(name, num_steps=7),
    )
    assert samples == 7 * per_step * branches * len(NOISE)


def test_no_gradient_is_recorded():
    weight = torch.ones(1, requires_grad=True)
    assert not solve(lambda x, t, y: x * weight, NOISE, LABELS, config()).requires_grad


def test_shift_of_the_released_sampler_in_numbers():
    grid = time_grid(config(num_steps=4, shift=0.3), SIZE)
    torch.testing.assert_close(grid, torch.tensor([0, 0.0909, 0.2308, 0.4737, 1]), atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("shape", "shift"),
    [((4, 32, 32), 1.0), ((32, 16, 16), 2**-0.5), ((768, 16, 16), 48**-0.5)],  # SD-VAE, VA-VAE, DINOv2-B of RAE
)
def test_shift_by_dimension_is_that_of_rae_in_our_direction_of_time(shape, shift):
    by_dimension, fixed = (time_grid(config(shift=s), math.prod(shape)) for s in ("by_dimension", shift))
    assert torch.equal(by_dimension, fixed)
    noise_level = 1 - torch.linspace(0, 1, 9)  # RAE's t runs from data to noise: t' = a t / (1 + (a - 1) t), a = 1 / s
    torch.testing.assert_close(1 - by_dimension, noise_level / shift / (1 + (1 / shift - 1) * noise_level))


def test_the_shift_is_that_of_the_latent_that_is_integrated():
    times = []
    solve(lambda x, t, y: times.append(t[0].item()) or x, NOISE, LABELS, config(shift="by_dimension"))
    assert times == time_grid(config(shift=(4096 / SIZE) ** 0.5), SIZE)[:-1].tolist()


@settings(deadline=None)
@given(num_steps=st.integers(1, 300), shift=st.floats(0.05, 20))
def test_the_grid_climbs_from_zero_to_one_and_a_reciprocal_shift_reverses_it(num_steps, shift):
    grid = time_grid(config(num_steps=num_steps, shift=shift), SIZE)
    assert len(grid) == num_steps + 1
    assert grid[0] == 0
    assert grid[-1] == pytest.approx(1, abs=1e-6)
    assert (grid.diff() > 0).all()
    mirrored = 1 - time_grid(config(num_steps=num_steps, shift=1 / shift), SIZE).flip(0)
    torch.testing.assert_close(grid, mirrored, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (SolverConfig(name="heun", num_steps=16), "heun 16 steps, shift 1"),
        (SolverConfig(num_steps=249, shift=0.3), "euler 249 steps, shift 0.3"),
        (SolverConfig(shift="by_dimension"), "euler 250 steps, shift by dimension"),
        (SolverConfig(name="dopri5"), "dopri5, relative tolerance 0.001, absolute 1e-06"),
        (GuidanceConfig(interval=(0.1, 1), channels=3), "no guidance"),
        (GuidanceConfig(scale=6.7, interval=(0.125, 1)), "guidance 6.7 for t in [0.125, 1]"),
        (GuidanceConfig(scale=10, channels=3), "guidance 10 for t in [0, 1] on 3 channels"),
    ],
)
def test_solver_and_guidance_in_words(solver, words):
    assert solver.summary == words
