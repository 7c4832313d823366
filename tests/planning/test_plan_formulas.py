"""The arithmetic of plans against cases computed by hand."""

import pytest

from vavae.errors import UserError
from vavae.planning.cluster import ClusterSpec, parse_gpus
from vavae.planning.formulas import (
    accumulation_steps_of,
    arithmetic_of,
    checkpoint_interval,
    exposed_seconds,
    gradient_bytes,
    lost_fraction,
    peak_rate,
    state_bytes,
)
from vavae.training.flops.gpus import Gpu

GPU = Gpu(bf16=1000.0, tf32=500.0, fp32=50.0, memory_bytes=1.0, link=1.0)


@pytest.mark.parametrize(
    ("precision", "tf32", "arithmetic", "rate"),
    [
        ("bf16", False, "bf16", 1000.0),
        ("bf16", True, "bf16", 1000.0),
        ("fp32", True, "tf32", 500.0),
        ("fp32", False, "fp32", 50.0),
    ],
)
def test_the_best_rate_depends_on_the_arithmetic(precision, tf32, arithmetic, rate):
    assert arithmetic_of(precision, tf32) == arithmetic
    assert peak_rate(GPU, arithmetic) == rate


@pytest.mark.parametrize(
    ("lanes", "workers", "accumulation_steps"), [(8, 1, 8), (8, 2, 4), (8, 3, 3), (8, 4, 2), (8, 8, 1)]
)
def test_lanes_are_taken_in_accumulation_steps(lanes, workers, accumulation_steps):
    assert accumulation_steps_of(lanes, workers) == accumulation_steps


@pytest.mark.parametrize(
    ("zero_stage", "accumulation_steps", "sent"),
    [(0, 1, 60), (1, 3, 60), (2, 1, 60), (2, 3, 120), (3, 1, 90), (3, 2, 180)],
)
def test_gradients_of_ten_weights_among_four_workers(zero_stage, accumulation_steps, sent):
    assert gradient_bytes(10, 4, zero_stage, accumulation_steps) == sent
    assert gradient_bytes(10, 1, zero_stage, accumulation_steps) == 0


@pytest.mark.parametrize(
    ("communication", "zero_stage", "waited"), [(5.0, 1, 5.0), (5.0, 3, 3.0), (2.0, 3, 0.0), (1.0, 0, 1.0)]
)
def test_only_zero_stage_3_hides_what_it_sends_behind_its_backward_pass(communication, zero_stage, waited):
    assert exposed_seconds(communication, 3.0, zero_stage) == waited


@pytest.mark.parametrize(
    ("zero_stage", "averaged", "offloaded", "size"),
    [
        (0, False, False, 160), (0, True, False, 170), (1, False, False, 80 + 30), (1, True, False, 80 + 40),
        (2, True, False, 40 + 50), (3, True, False, 60), (1, False, True, 80), (3, True, True, 30),
    ],
)  # fmt: skip
def test_states_of_ten_weights_among_four_workers(zero_stage, averaged, offloaded, size):
    assert state_bytes(10, 4, zero_stage, averaged=averaged, offloaded=offloaded) == size


def test_published_states():
    """LightningDiT-XL on one GPU: 10.8 GB, and 2.7 GB for the average."""
    assert state_bytes(675_000_000, 1, 0, averaged=False) == 10.8e9
    assert state_bytes(675_000_000, 1, 0, averaged=True) == pytest.approx(13.5e9)


def test_checkpoints_that_lose_the_least():
    """A stall of 0.1 s and a failure a day: 2.2 minutes. Nothing near it loses less."""
    best = checkpoint_interval(0.1, 86_400)
    assert best == pytest.approx(2.2 * 60, rel=0.01)
    assert lost_fraction(0.1, best, 86_400) == pytest.approx(2 * 0.1 / best)
    assert all(lost_fraction(0.1, best * factor, 86_400) > lost_fraction(0.1, best, 86_400) for factor in (0.9, 1.1))


def test_machines_of_an_offer():
    assert [ClusterSpec("H100", count).nodes for count in (1, 8, 9, 64)] == [1, 1, 2, 8]
    assert ClusterSpec("H100", 8).interconnect == 450e9
    assert ClusterSpec("H100", 16, network=7.0).interconnect == 7.0


def test_gpus_are_written_as_number_and_name():
    assert parse_gpus("64xh100") == (64, "H100")
    for text in ("H100", "0xH100", "64", "64 x H100"):
        with pytest.raises(UserError, match=r"^--gpus .*: write a number, an x and a name, such as 64xH100$"):
            parse_gpus(text)
