"""The arithmetic of a plan: pure functions of numbers, each with its source.

Weights, gradients, moments and averages are fp32 in every precision.
"""

import math
from typing import Literal, NamedTuple

from vavae.distributed.config import EngineConfig, Precision
from vavae.planning.sizes import FLOAT_BYTES, HALF_BYTES
from vavae.training.flops.gpus import Gpu

Arithmetic = Literal["bf16", "tf32", "fp32"]


def arithmetic_of(precision: Precision, tf32: bool) -> Arithmetic:
    """Arithmetic of convolutions and matrix products; `tf32` is that of `workers`."""
    if precision == "bf16":
        return "bf16"
    return "tf32" if tf32 else "fp32"


def peak_rate(gpu: Gpu, arithmetic: Arithmetic) -> float:
    """Peak FLOP/s of a GPU."""
    return {"bf16": gpu.bf16, "tf32": gpu.tf32, "fp32": gpu.fp32}[arithmetic]


def accumulation_steps_of(lanes: int, workers: int) -> int:
    """Micro-batches that a worker takes in a step: ⌈L / W⌉; the last may be empty for some workers."""
    return -(-lanes // workers)


class Traffic(NamedTuple):
    """Bytes that leave a worker in a step, by the computation that hides them."""

    forward: float = 0.0
    """Sent during every forward pass."""
    backward: float = 0.0
    """Sent during every backward pass."""
    last_backward: float = 0.0
    """Sent during the backward pass of the last accumulation step."""
    after: float = 0.0
    """Sent after it, when nothing is computed."""

    @property
    def total(self) -> float:
        """Bytes of the whole step."""
        return sum(self)


def step_traffic(
    parameters: int, workers: int, engine: EngineConfig, accumulation_steps: int, updates: float = 0
) -> Traffic:
    """Bytes that leave a worker in a step, from the sources of the engines (DeepSpeed 0.19.8) and counted in a test.

    A ring sends (W - 1) / W of what it gathers or reduces and scatters, and twice as much of what all receive reduced.

    * Plain PyTorch: all gradients are reduced for all in the last backward pass.
    * ZeRO stage 0: likewise, but after it (`buffered_allreduce_fallback`).
    * 1: likewise in it (`overlap_comm`); a worker keeps its part of each reduced bucket, which all receive
      (`allreduce_and_scatter`), and gathers the updated weights (`all_gather_dp_groups`): "3 N".
    * 2: reduces so in every accumulation step, and gathers once.
    * 3: gathers the weights for every forward pass, and for every backward pass those that were not kept; gradients are
      reduced and scattered in each (`reduce_scatter_coalesced`).

    Plain PyTorch and stage 0 gather Muon's updates after the backward pass.

    Args:
        parameters: trained weights N.
        workers: W, on GPUs.
        engine: backend, stage, limits, and the precision of gradients; weights travel in fp32.
        accumulation_steps: forward and backward passes of the step.
        updates: bytes of Muon's updates.
    """
    gathered = updates * (workers - 1) / workers
    sent = parameters * (workers - 1) / workers
    gradients, weights = _gradient_size(engine) * sent, FLOAT_BYTES * sent
    if engine.backend == "torch":
        return Traffic(last_backward=2 * gradients, after=gathered)
    if engine.zero_stage == 0:
        return Traffic(after=2 * gradients + gathered)
    if engine.zero_stage == 1:
        return Traffic(last_backward=2 * gradients, after=weights)
    if engine.zero_stage == 2:
        return Traffic(backward=2 * gradients * accumulation_steps, after=weights)
    again = 1 - live_parameters(parameters, engine) / parameters
    return Traffic(weights * accumulation_steps, (weights * again + gradients) * accumulation_steps)


def exposed_seconds(traffic: Traffic, bytes_per_second: float, compute: float, accumulation_steps: int) -> float:
    """Seconds of a step's communication that training waits for; a backward pass is two thirds of the computation.

    Args:
        traffic: of the step.
        bytes_per_second: at which it leaves a worker.
        compute: seconds of all forward and backward passes of the step.
        accumulation_steps: how many of each.
    """
    backward = 2 / 3 * compute
    hidden = Traffic(compute - backward, backward, backward / accumulation_steps)
    return sum(max(0.0, sent / bytes_per_second - seconds) for sent, seconds in zip(traffic, hidden, strict=True))


DEFAULT_LIVE_PARAMETERS = DEFAULT_REUSE_DISTANCE = 1_000_000_000
"""DeepSpeed's own `max_live_parameters` and `max_reuse_distance`."""


def live_parameters(parameters: int, engine: EngineConfig) -> float:
    """Gathered weights that ZeRO stage 3 holds at the end of a forward pass, up to a layer more or less.

    It keeps a layer whose backward pass is within `max_reuse_distance` weights, which counts the way to the end and
    back (`__params_to_release`), and gathers ahead until `max_live_parameters` are there; what was there when it looked
    ahead stays (`fetch_sub_module`). The second therefore limits only what is gathered ahead.
    """
    live, reuse = engine.max_live_parameters, engine.max_reuse_distance
    live = DEFAULT_LIVE_PARAMETERS if live is None else live
    reuse = DEFAULT_REUSE_DISTANCE if reuse is None else reuse
    return min(parameters, max(live, reuse / 2))


class BufferBytes(NamedTuple):
    """Bytes on a GPU beside states and activations."""

    backward: float = 0.0
    """Held during the backward pass, with the activations."""
    after: float = 0.0
    """Held after it, without them."""


_UNPARTITIONED_BUCKET = 500_000_000
"""Gradients that DeepSpeed flattens at once in stage 0 (`MEMORY_OPT_ALLREDUCE_SIZE`)."""


def buffer_bytes(parameters: int, workers: int, engine: EngineConfig) -> BufferBytes:
    """Bytes of buckets and of gathered weights, from the sources of the engines (DeepSpeed 0.19.8).

    * Plain PyTorch: gradients live in the buckets; in bf16 each travels as a copy, kept until all have arrived.
    * ZeRO stage 0: a flat copy of the gradients that are reduced at once, after the backward pass.
    * 1 and 2: a bucket, two where communication overlaps (`setup_buckets`), whole whatever the model's size, and the
      flat copy that travels (`allreduce_bucket`), another one in bf16.
    * 3: a bucket and the copy that travels, both in the precision of communication, and the gathered weights.

    Args:
        parameters: trained weights.
        workers: on GPUs, which overlap where there are several.
        engine: backend, stage, bucket and limits.
    """
    size = _gradient_size(engine)
    converted = size if size != FLOAT_BYTES else 0
    bucket, traveling = engine.bucket_elements, min(engine.bucket_elements, parameters)
    if engine.backend == "torch":
        return BufferBytes(converted * parameters if workers > 1 else 0)
    if engine.zero_stage == 0:
        return BufferBytes(after=(FLOAT_BYTES + converted) * min(parameters, _UNPARTITIONED_BUCKET))
    if engine.zero_stage <= 2:
        buckets = 2 if workers > 1 else 1
        return BufferBytes(FLOAT_BYTES * buckets * bucket + (FLOAT_BYTES + converted) * traveling)
    gathered = live_parameters(parameters, engine) if workers > 1 else 0  # one worker has them at hand
    return BufferBytes(size * (bucket + traveling) + FLOAT_BYTES * gathered)


def _gradient_size(engine: EngineConfig) -> int:
    """Bytes of a gradient on its way."""
    return HALF_BYTES if engine.communication_data_type == "bf16" else FLOAT_BYTES


def state_bytes(
    parameters: int,
    workers: int,
    zero_stage: int,
    *,
    averaged: int,
    offloaded: bool = False,
    of_muon: int = 0,
) -> float:
    """Bytes on a GPU for weights, gradients, two moments and `averaged` averages of so many parameters.

    Of those that Muon updates, which needs stage 0, there is one moment.

    ZeRO, arXiv 1910.02054, section 5: stage 1 divides the moments among the workers, stage 2 also the gradients, stage
    3 also the weights. DeepSpeed adds a divided copy of the weights in stages 1 to 3, which goes to the host's memory
    with the moments where they are offloaded. Averages are always divided. `buffer_bytes` come on top.
    """
    share = 1 / workers
    weights = share if zero_stage == 3 else 1
    gradients = share if zero_stage >= 2 else 1
    moments_and_copy = 2 if zero_stage == 0 else 0 if offloaded else 3 * share
    return FLOAT_BYTES * (parameters * (weights + gradients + moments_and_copy + averaged * share) - of_muon)


def checkpoint_interval(stall: float, between_failures: float) -> float:
    """Seconds between checkpoints that lose the least: √(2 δ M), Young, CACM 17(9), 1974."""
    return math.sqrt(2 * stall * between_failures)


def lost_fraction(stall: float, interval: float, between_failures: float) -> float:
    """Fraction of the time lost to stalls and to what failures make do again, half an interval each time (Young)."""
    return stall / interval + interval / (2 * between_failures)
