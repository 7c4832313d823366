"""Power profiles against the public implementation and in closed form, and other profiles from sums of some."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import golden
from torch import Tensor, nn

from vavae.distributed.config import EngineConfig, OptimizerConfig
from vavae.distributed.engine import TorchEngine
from vavae.distributed.world import World
from vavae.runs.training_config import WIDEST_STD, AverageConfig
from vavae.training.ema import FurtherAverage
from vavae.training.power_profiles import PowerProfile, exponent_of, nearest_sum, power_decay

SPEC, TENSORS = golden("beyond_power_ema")
EXACT = {"rtol": 1e-10, "atol": 1e-10}
"""Tolerance of the fixture in float64."""
BATCH = SPEC["batch"]
KEPT = [
    PowerProfile(int(images), std)
    for images, std in zip(TENSORS["snapshot.images"].tolist(), TENSORS["snapshot.std"].tolist(), strict=True)
]


def averages_of(config: AverageConfig, values: Tensor, batch_size: int = BATCH) -> Tensor:
    """The average after each update with the given weights [N, ...], which it begins with the first of."""
    module = nn.Module()
    module.weight = nn.Parameter(values[0].clone())
    engine = TorchEngine(module, OptimizerConfig(), EngineConfig(), World(), 1)
    average, found = FurtherAverage(engine, config, batch_size, World()), []
    for step, value in enumerate(values, 1):
        module.weight.data.copy_(value)
        average.update_after(step * batch_size)
        found.append(average.weights()["weight"].clone())
    return torch.stack(found)


def test_exponents_and_decays_are_those_of_edm2() -> None:
    exponents = [exponent_of(std) for std in SPEC["stds"]]
    torch.testing.assert_close(torch.tensor(exponents, dtype=torch.float64), TENSORS["out.exponent"], **EXACT)
    decays = [[power_decay(std, BATCH, step * BATCH) for std in SPEC["stds"]] for step in range(1, SPEC["steps"] + 1)]
    torch.testing.assert_close(torch.tensor(decays, dtype=torch.float64), TENSORS["out.beta"], **EXACT)
    assert exponent_of(0.05) == pytest.approx(16.9722, abs=1e-4)
    assert exponent_of(WIDEST_STD) == pytest.approx(0, abs=1e-6)


def test_averages_are_those_of_edm2() -> None:
    """Kept in fp32, where the fixture is float64."""
    weights, every = TENSORS["in.weights"], SPEC["snapshot_every"]
    for index, std in enumerate(SPEC["stds"]):
        found = averages_of(AverageConfig(name="a", std=std), weights)[every - 1 :: every]
        torch.testing.assert_close(found.double(), TENSORS["snapshot.weights"][index::2], rtol=1e-5, atol=1e-6)
    half_life = SPEC["halflife_mimg"] * 1e6
    decayed = AverageConfig(name="a", decay=0.5 ** (BATCH / half_life), ramp=SPEC["rampup_ratio"])
    found = averages_of(decayed, weights)
    torch.testing.assert_close(found.double(), TENSORS["traditional.weights"], rtol=1e-5, atol=1e-6)


def test_reconstructions_are_those_of_edm2() -> None:
    end = SPEC["steps"] * BATCH
    for index, std in enumerate(SPEC["out_stds"]):
        found = nearest_sum(KEPT, PowerProfile(end, std))
        torch.testing.assert_close(found.coefficients, TENSORS["posthoc.coefficients"][:, index], **EXACT)
        weights = torch.einsum("n,n...->...", found.coefficients, TENSORS["snapshot.weights"])
        torch.testing.assert_close(weights, TENSORS["posthoc.weights"][index], **EXACT)


@settings(max_examples=30, deadline=None)
@given(std=st.floats(0.02, 0.28), count=st.integers(1, 12))
def test_a_constant_stays_and_a_kept_profile_is_itself(std: float, count: int) -> None:
    profiles = [PowerProfile(100 * (1 + n), each) for n in range(count) for each in (0.05, 0.1)]
    wished = PowerProfile(100 * count, std)
    found = nearest_sum(profiles, wished)
    assert found.coefficients.sum().item() == pytest.approx(1)
    kept = nearest_sum([*profiles, wished], wished) if std not in (0.05, 0.1) else found
    assert kept.error < 1e-4
    expected = torch.zeros(len(kept.coefficients), dtype=torch.float64)
    expected[-1] = 1
    if abs(std - 0.05) > 0.01 and abs(std - 0.1) > 0.01:
        torch.testing.assert_close(kept.coefficients, expected, rtol=0, atol=1e-5)
    constant = torch.full((20, 3), 2.5)
    assert averages_of(AverageConfig(name="a", std=std), constant).equal(constant)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_the_mean_of_a_profile(std: float) -> None:
    """With weights that grow as the images do, the average tends to T (γ + 1) / (γ + 2)."""
    steps = 4000
    grown = averages_of(AverageConfig(name="a", std=std), torch.arange(1.0, steps + 1)[:, None], batch_size=1)
    exponent = exponent_of(std)
    assert grown[-1].item() / steps == pytest.approx((exponent + 1) / (exponent + 2), rel=1e-3)


def test_the_error_says_what_snapshots_reach() -> None:
    """More snapshots reach narrower profiles, at the price of rounding; published sums of coefficients."""

    def of_snapshots(count: int, std: float):
        return nearest_sum(
            [PowerProfile(1000 * n, each) for n in range(1, count + 1) for each in (0.05, 0.1)],
            PowerProfile(1000 * count, std),
        )

    errors = [of_snapshots(count, 0.025).error for count in (4, 16, 64)]
    assert errors[0] > 0.2 > 0.1 > errors[1] > errors[2]
    sums = {std: of_snapshots(128, std).amplification for std in (0.075, 0.15, 0.04, 0.025, 0.015)}
    assert sums == pytest.approx({0.075: 1.5, 0.15: 1.7, 0.04: 4.5, 0.025: 24, 0.015: 85}, rel=0.04)
