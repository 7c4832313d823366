"""Trace of one turn of a benchmark, and what it shows: waits of the host for the device, and communication."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_TURN = "vavae: one turn"
_RUNTIME_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls of CUDA in which the host waits; a copy to pageable memory is followed by the first."""
_VALUE_READ = "aten::_local_scalar_dense"
"""Operator that reads one value of a tensor; on a GPU it makes one of the calls above."""
_COLLECTIVES = ("nccl", "gloo:")


class TurnProfile(NamedTuple):
    """Facts about one turn."""

    waits: Mapping[str, int]
    """Host synchronizations by the name of the call, of CUDA where it was used; else reads of single values, each of
    which would be one on a GPU."""
    communication: float
    """Share of the turn in which collectives were at work."""


def profile_turn(turn: Callable[[], object], device: torch.device, file: Path) -> TurnProfile:
    """Run one turn under the profiler of torch.

    Args:
        turn: one turn of a side, warm.
        device: its device.
        file: gets the trace in Chrome's format, which Perfetto opens (ui.perfetto.dev).
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        with record_function(_TURN):
            turn()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    profiler.export_chrome_trace(str(file))
    return read_trace(json.loads(file.read_text())["traceEvents"], seconds)


def read_trace(events: Iterable[Mapping[str, Any]], seconds: float) -> TurnProfile:
    """Count what a trace shows of the turn.

    Args:
        events: `traceEvents` of Chrome's format; times are in microseconds.
        seconds: length of the turn, with what the device had to do after the host was done.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    turn = next(each for each in complete if each["name"] == _TURN and each.get("cat") == "user_annotation")
    calls = Counter(
        event["name"]
        for event in complete
        if event["name"] in (*_RUNTIME_WAITS, _VALUE_READ) and 0 <= event["ts"] - turn["ts"] <= turn["dur"]
    )
    runtime = {name: count for name, count in calls.items() if name in _RUNTIME_WAITS}
    # A collective shows on the host and, with NCCL, as kernels; those are what takes the device's time.
    collectives = [event for event in complete if event["name"].startswith(_COLLECTIVES)]
    kernels = [event for event in collectives if event.get("cat") == "kernel"]
    busy = sum(event["dur"] for event in kernels or collectives) / 1e6
    return TurnProfile(runtime or {_VALUE_READ: calls[_VALUE_READ]}, busy / seconds)
