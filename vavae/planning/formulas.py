"""The arithmetic of a plan: pure functions of numbers, each with its source.

Weights, gradients, moments and averages are fp32 in every precision.
"""

import math
from typing import Literal

from vavae.distributed.config import Precision
from vavae.planning.sizes import FLOAT_BYTES
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


def gradient_bytes(parameters: int, workers: int, zero_stage: int, accumulation_steps: int) -> float:
    """Bytes that leave a worker in a step: ZeRO, arXiv 1910.02054, section 7, with fp32 throughout.

    A ring sends (W - 1) / W of what it reduces, and as much of what it gathers. ZeRO stages 0 and 1 reduce and
    gather once a step; 2 reduces in every accumulation step and gathers once; 3 reduces once and gathers twice in each.
    """
    passes = {0: 2, 1: 2, 2: 1 + accumulation_steps, 3: 3 * accumulation_steps}[zero_stage]
    return passes * FLOAT_BYTES * parameters * (workers - 1) / workers


def exposed_seconds(communication: float, compute: float, zero_stage: int) -> float:
    """Seconds of a communication that training waits for.

    DeepSpeed overlaps it in ZeRO stage 3 alone (its default); it is hidden by the backward pass, two thirds of a step.
    """
    return max(0.0, communication - 2 / 3 * compute) if zero_stage == 3 else communication


def state_bytes(parameters: int, workers: int, zero_stage: int, *, averaged: bool, offloaded: bool = False) -> float:
    """Bytes on a GPU for weights, gradients, two moments and the average of so many parameters.

    ZeRO, arXiv 1910.02054, section 5: stage 1 divides the moments among the workers, stage 2 also the gradients, stage
    3 also the weights. DeepSpeed adds a divided copy of the weights in stages 1 to 3, which goes to the host's memory
    with the moments where they are offloaded. The average is always divided. DeepSpeed's buckets come on top.
    """
    share = 1 / workers
    weights = share if zero_stage == 3 else 1
    gradients = share if zero_stage >= 2 else 1
    moments_and_copy = 2 if zero_stage == 0 else 0 if offloaded else 3 * share
    return FLOAT_BYTES * parameters * (weights + gradients + moments_and_copy + averaged * share)


def checkpoint_interval(stall: float, between_failures: float) -> float:
    """Seconds between checkpoints that lose the least: √(2 δ M), Young, CACM 17(9), 1974."""
    return math.sqrt(2 * stall * between_failures)


def lost_fraction(stall: float, interval: float, between_failures: float) -> float:
    """Fraction of the time lost to stalls and to what failures make do again, half an interval each time (Young)."""
    return stall / interval + interval / (2 * between_failures)
