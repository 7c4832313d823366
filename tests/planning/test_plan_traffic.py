"""The traffic and limits of plans against what the engines do."""

import pytest
from support.engine_parity import TORCH, ZERO
from support.traffic import count_traffic
from support.training_steps import CLASSES, LANES, tiny_config

from vavae.distributed.config import EngineConfig
from vavae.planning.formulas import (
    DEFAULT_LIVE_PARAMETERS,
    DEFAULT_REUSE_DISTANCE,
    accumulation_steps_of,
    live_parameters,
    step_traffic,
)
from vavae.planning.sizes import muon_matrices, trained_parameters

HALF = {"communication_data_type": "bf16"}
NOTHING_KEPT = {"max_live_parameters": 0, "max_reuse_distance": 0}
SOME_KEPT = {"max_live_parameters": 0, "max_reuse_distance": 40_000}
EXACT = [TORCH, {**TORCH, **HALF}, *ZERO, *({**engine, **HALF} for engine in ZERO[1:]), {**ZERO[3], **NOTHING_KEPT}]
LAYER = 2000
"""More weights than a layer has that is in part beyond a limit."""


@pytest.mark.parametrize("workers", [2, 4])
def test_engines_send_what_the_plan_says(gloo, workers):
    """Two accumulation steps with two workers, one with four; tensors are padded to a multiple of the workers."""
    config = tiny_config()
    config = config.model_copy(update={"lightningdit": config.lightningdit.with_classes(CLASSES)})
    parameters = trained_parameters(config, "train_lightningdit")["lightningdit"]
    steps = accumulation_steps_of(LANES, workers)
    engines = [*EXACT, {**ZERO[3], **SOME_KEPT}]
    *counts, some_kept = gloo.run(workers, count_traffic, engines)[0]
    *planned, some_planned = (
        step_traffic(parameters, workers, EngineConfig.model_validate(engine), steps) for engine in engines
    )
    padded = 1 + 1e-3
    for engine, count, traffic in zip(EXACT, counts, planned, strict=True):
        assert traffic.total <= count <= padded * traffic.total, engine
    assert live_parameters(parameters, EngineConfig.model_validate(SOME_KEPT)) == 20_000 < parameters
    layer = 4 * LAYER * steps * (workers - 1) / workers
    assert some_kept == pytest.approx(some_planned.total, abs=layer)


def test_muon_s_updates_are_gathered_as_the_plan_says(gloo):
    workers, engines = 2, [TORCH, ZERO[0]]
    config = tiny_config(engine=TORCH, optimizer={"muon": {}})
    config = config.model_copy(update={"lightningdit": config.lightningdit.with_classes(CLASSES)})
    parameters = trained_parameters(config, "train_lightningdit")["lightningdit"]
    updates = muon_matrices(config, "train_lightningdit")["lightningdit"].update_bytes
    steps = accumulation_steps_of(LANES, workers)
    for engine, count in zip(engines, gloo.run(workers, count_traffic, engines, {})[0], strict=True):
        plain = step_traffic(parameters, workers, EngineConfig.model_validate(engine), steps).total
        traffic = step_traffic(parameters, workers, EngineConfig.model_validate(engine), steps, updates).total
        assert traffic == plain + updates / 2
        # Ranks differ in what they orthogonalize, and send as much as the one with the most.
        assert traffic <= count <= plain + 1.2 * updates / 2


def test_limits_that_are_left_open_are_those_of_deepspeed():
    config = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig()
    assert (config.max_live_parameters, config.max_reuse_distance) == (DEFAULT_LIVE_PARAMETERS, DEFAULT_REUSE_DISTANCE)
