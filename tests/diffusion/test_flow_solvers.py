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


def config(name="euler", num_steps=8, shift=1.0):
    return SolverConfig(name=name, num_steps=num_steps, shift=shift)


@pytest.mark.parametrize(("start", "unguided"), [(0.1, 68), (0.125, 81), (0.11, 73)])
def test_the_released_interval_leaves_the_published_number_of_steps_unguided(start, unguided):
    guidance = ClassifierFreeGuidance(
        lambda x, t, y: x, torch.zeros(1), 0, GuidanceConfig(scale=10, interval=(start, 1))
    )
    times = time_grid(config(num_steps=249, shift=0.3))[:-1].tolist()
    assert sum(not guidance.active(t) for t in times) == unguided


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
    assert torch.equal(solve(ClassifierFreeGuidance(model, labels, null, released), noise, solver), expected)


def test_integration_runs_from_noise_at_zero_to_data_at_one():
    seen = []

    def velocity(x, t):
        seen.append((t, x))
        return (DATA - x) / (1 - t)  # of the straight path to one known image

    torch.testing.assert_close(solve(velocity, NOISE, config()), DATA, atol=1e-5, rtol=0)
    assert seen[0][0] == 0
    assert torch.equal(seen[0][1], NOISE)
    assert [t for t, _ in seen] == sorted(t for t, _ in seen)


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("shift", [1.0, 0.3])
def test_a_constant_velocity_is_integrated_exactly(name, shift):
    out = solve(lambda x, t: DATA, NOISE, config(name, 4, shift))
    torch.testing.assert_close(out, NOISE + DATA, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_heun_is_exact_for_a_velocity_linear_in_time_and_euler_misses_by_half_a_step(num_steps):
    def velocity(x, t):
        return torch.full_like(x, 1 + 4 * t)  # its integral over [0, 1] is 3

    for name, missing in (("heun", 0.0), ("euler", 2 / num_steps)):
        torch.testing.assert_close(solve(velocity, NOISE, config(name, num_steps)), NOISE + 3 - missing)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence_on_exponential_growth(name, order):
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    coarse, fine = (abs(solve(lambda x, t: x, x, config(name, n)).item() - math.e) for n in (32, 64))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize(("name", "per_step"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize(("scale", "branches"), [(1.0, 1), (2.0, 2)])
def test_number_of_evaluations(name, per_step, scale, branches):
    samples = 0

    def model(x, t, y):
        nonlocal samples
        samples += len(x)
        return x

    guidance = ClassifierFreeGuidance(model, torch.tensor([0, 1]), 9, GuidanceConfig(scale=scale))
    solve(guidance, NOISE, config(name, num_steps=7))
    assert samples == 7 * per_step * branches * len(NOISE)


def test_no_gradient_is_recorded():
    weight = torch.ones(1, requires_grad=True)
    assert not solve(lambda x, t: x * weight, NOISE, config()).requires_grad


def test_shift_of_the_released_sampler_in_numbers():
    grid = time_grid(config(num_steps=4, shift=0.3))
    torch.testing.assert_close(grid, torch.tensor([0, 0.0909, 0.2308, 0.4737, 1]), atol=5e-5, rtol=0)


@settings(deadline=None)
@given(num_steps=st.integers(1, 300), shift=st.floats(0.05, 20))
def test_the_grid_climbs_from_zero_to_one_and_a_reciprocal_shift_reverses_it(num_steps, shift):
    grid = time_grid(config(num_steps=num_steps, shift=shift))
    assert len(grid) == num_steps + 1
    assert grid[0] == 0
    assert grid[-1] == pytest.approx(1, abs=1e-6)
    assert (grid.diff() > 0).all()
    mirrored = 1 - time_grid(config(num_steps=num_steps, shift=1 / shift)).flip(0)
    torch.testing.assert_close(grid, mirrored, atol=1e-5, rtol=0)
