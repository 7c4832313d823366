"""The losses per sample: closed forms, and the public implementation."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from vavae.diffusion.config import TIMESTEP_BINS, ObjectiveConfig
from vavae.diffusion.flow_matching import FlowMatchingObjective, LinearPath, bin_by_timestep

VELOCITY = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))


def test_the_path_equals_the_public_implementation_bit_for_bit_and_its_losses_do():
    golden = load_file(Path(__file__).parents[1] / "golden" / "flow_euler.safetensors")
    path = LinearPath.sample(golden["loss.x1"], golden["loss.x0"], golden["loss.t"])
    assert torch.equal(path.x_t, golden["loss.xt"])
    losses = FlowMatchingObjective(ObjectiveConfig())(path.x_t.tanh(), path.velocity)
    # Bitwise identical where a mean adds in the same order, which depends on the processor.
    torch.testing.assert_close(losses.velocity, golden["loss.mse"], atol=1e-6, rtol=0)
    torch.testing.assert_close(losses.direction, golden["loss.cos"], atol=1e-6, rtol=0)
    torch.testing.assert_close(losses.total, golden["loss.mse"] + golden["loss.cos"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("factor", "direction"), [(1.0, 0.0), (3.0, 0.0), (-1.0, 2.0), (0.0, 1.0)])
def test_a_multiple_of_the_velocity_has_losses_in_closed_form(factor, direction):
    losses = FlowMatchingObjective(ObjectiveConfig(direction_weight=0.5))(factor * VELOCITY, VELOCITY)
    squared = (factor - 1) ** 2 * VELOCITY.square().mean((1, 2, 3))
    torch.testing.assert_close(losses.velocity, squared)
    torch.testing.assert_close(losses.direction, torch.full((3,), direction), atol=1e-6, rtol=0)
    torch.testing.assert_close(losses.total, squared + 0.5 * direction)


def test_direction_is_judged_at_each_position_over_the_channels():
    prediction = VELOCITY.clone()
    prediction[0, :, 0, 0] *= -1  # one of sixteen positions of one sample points the wrong way
    direction = FlowMatchingObjective(ObjectiveConfig())(prediction, VELOCITY).direction
    torch.testing.assert_close(direction, torch.tensor([2 / 16, 0, 0]), atol=1e-6, rtol=0)


def test_losses_of_bfloat16_predictions_are_float32():
    losses = FlowMatchingObjective(ObjectiveConfig())(VELOCITY.bfloat16(), VELOCITY)
    assert all(term.dtype == torch.float32 for term in losses[:3])
    assert 0 < losses.velocity.max() < 1e-4  # the rounding of the prediction, not of the sum


def test_losses_fall_into_ten_bins_closed_below():
    t = torch.tensor([0.0, 0.05, 0.1, 0.95, 1.0])
    bins = bin_by_timestep(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), t)
    assert bins.total.tolist() == [3, 4, 0, 0, 0, 0, 0, 0, 0, 24]
    assert bins.samples.tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]


@settings(deadline=None, max_examples=30)
@given(t=st.lists(st.floats(0, 1, width=32), min_size=2, max_size=20), cut=st.integers(0, 20))
def test_bins_lose_nothing_and_add_up_over_batches(t, cut):
    t = torch.tensor(t)
    losses = torch.arange(1.0, len(t) + 1)
    whole, first, rest = (
        bin_by_timestep(losses[part], t[part]) for part in (slice(None), slice(cut), slice(cut, None))
    )
    assert whole.total.sum() == losses.sum()
    assert whole.samples.sum() == len(t)
    assert len(whole.total) == TIMESTEP_BINS
    assert torch.equal(first.total + rest.total, whole.total)
    assert torch.equal(first.samples + rest.samples, whole.samples)
