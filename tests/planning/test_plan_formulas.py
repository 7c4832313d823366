"""The arithmetic of plans against cases computed by hand."""

import pytest

from vavae.distributed.config import EngineConfig
from vavae.errors import UserError
from vavae.planning.cluster import ClusterSpec, parse_gpus
from vavae.planning.formulas import (
    BufferBytes,
    Traffic,
    accumulation_steps_of,
    arithmetic_of,
    buffer_bytes,
    checkpoint_interval,
    exposed_seconds,
    live_parameters,
    lost_fraction,
    peak_rate,
    state_bytes,
    step_traffic,
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


LIMITS = {"max_live_parameters": 0, "max_reuse_distance": 8}
"""Ten weights, of which ZeRO stage 3 keeps four."""


def _engine(**fields):
    return EngineConfig.model_validate({"backend": "deepspeed", "bucket_elements": 6, **LIMITS, **fields})


@pytest.mark.parametrize(
    ("engine", "accumulation_steps", "traffic"),
    [
        ({"backend": "torch"}, 3, Traffic(last_backward=60)),
        ({"backend": "torch", "communication_data_type": "bf16"}, 3, Traffic(last_backward=30)),
        ({"zero_stage": 0}, 3, Traffic(after=60)),
        ({"zero_stage": 1}, 3, Traffic(last_backward=60, after=30)),
        ({"zero_stage": 1, "communication_data_type": "bf16"}, 3, Traffic(last_backward=30, after=30)),
        ({"zero_stage": 2}, 1, Traffic(backward=60, after=30)),
        ({"zero_stage": 2}, 3, Traffic(backward=180, after=30)),
        ({"zero_stage": 3}, 1, Traffic(30, 30 * 0.6 + 30)),
        ({"zero_stage": 3}, 2, Traffic(60, 2 * (30 * 0.6 + 30))),
        ({"zero_stage": 3, "max_reuse_distance": None}, 1, Traffic(30, 30)),
        ({"zero_stage": 3, "max_live_parameters": None, "communication_data_type": "bf16"}, 1, Traffic(30, 15)),
    ],
)
def test_traffic_of_ten_weights_among_four_workers(engine, accumulation_steps, traffic):
    assert step_traffic(10, 4, _engine(**engine), accumulation_steps) == pytest.approx(traffic)
    assert step_traffic(10, 1, _engine(**engine), accumulation_steps).total == 0


@pytest.mark.parametrize(
    ("traffic", "accumulation_steps", "waited"),
    [
        (Traffic(after=5), 1, 5),
        (Traffic(forward=5), 1, 4),
        (Traffic(backward=5), 1, 3),
        (Traffic(backward=5), 2, 3),
        (Traffic(last_backward=5), 1, 3),
        (Traffic(last_backward=5), 2, 4),
        (Traffic(1, 1, 1, 1), 1, 1),
    ],
)
def test_what_is_computed_hides_what_is_sent_meanwhile(traffic, accumulation_steps, waited):
    """A second forward and two backward."""
    assert exposed_seconds(traffic, 1.0, 3.0, accumulation_steps) == pytest.approx(waited)


@pytest.mark.parametrize(
    ("max_live_parameters", "max_reuse_distance", "kept"),
    [(0, 0, 0), (0, 8, 4), (7, 8, 7), (0, 30, 10), (20, 0, 10), (None, 0, 10), (0, None, 10)],
)
def test_gathered_weights_are_limited_by_the_model_and_two_fields(max_live_parameters, max_reuse_distance, kept):
    limits = {"max_live_parameters": max_live_parameters, "max_reuse_distance": max_reuse_distance}
    assert live_parameters(10, _engine(**limits)) == kept


@pytest.mark.parametrize(
    ("engine", "held"),
    [
        ({"backend": "torch"}, BufferBytes()),
        ({"backend": "torch", "communication_data_type": "bf16"}, BufferBytes(20)),
        ({"zero_stage": 0}, BufferBytes(after=40)),
        ({"zero_stage": 0, "communication_data_type": "bf16"}, BufferBytes(after=60)),
        ({"zero_stage": 1}, BufferBytes(4 * (2 * 6 + 6))),
        ({"zero_stage": 2, "communication_data_type": "bf16"}, BufferBytes(4 * (2 * 6 + 6) + 2 * 6)),
        ({"zero_stage": 2, "bucket_elements": 100}, BufferBytes(4 * (2 * 100 + 10))),
        ({"zero_stage": 3}, BufferBytes(4 * (6 + 6) + 4 * 4)),
        ({"zero_stage": 3, "communication_data_type": "bf16"}, BufferBytes(2 * (6 + 6) + 4 * 4)),
    ],
)
def test_buffers_for_ten_weights_among_four_workers(engine, held):
    assert buffer_bytes(10, 4, _engine(**engine)) == held


def test_one_worker_needs_one_bucket_and_gathers_nothing():
    assert buffer_bytes(10, 1, _engine(zero_stage=1)).backward == 4 * (6 + 6)
    assert buffer_bytes(10, 1, _engine(zero_stage=3)).backward == 4 * (6 + 6)


@pytest.mark.parametrize(
    ("zero_stage", "averaged", "offloaded", "size"),
    [
        (0, False, False, 160), (0, True, False, 170), (1, False, False, 80 + 30), (1, True, False, 80 + 40),
        (2, True, False, 40 + 50), (3, True, False, 60), (1, False, True, 80), (3, True, True, 30),
    ],
)  # fmt: skip
def test_states_of_ten_weights_among_four_workers(zero_stage, averaged, offloaded, size):
    assert state_bytes(10, 4, zero_stage, averaged=averaged, offloaded=offloaded) == size


def test_matrices_of_muon_have_one_moment():
    assert state_bytes(10, 4, 0, averaged=True, of_muon=6) == 4 * (10 * 4 - 6) + 10
    engine = EngineConfig(backend="torch")
    assert step_traffic(10, 4, engine, 2, updates=12) == Traffic(last_backward=60, after=9)
    assert step_traffic(10, 4, _engine(zero_stage=0), 2, updates=12) == Traffic(after=69)


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
