"""Time of a step by phase, without making a GPU wait."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

Mark = float | torch.cuda.Event
"""A moment of the host's clock, seconds, or in the GPU's queue of work."""


class _Span(NamedTuple):
    phase: str
    start: Mark
    end: Mark


class Stopwatch:
    """Clock of the phases of steps, seconds since it was last read.

    On a GPU a phase lasts from when the GPU comes to its first kernel until it is done with the last: both ends are
    events in the stream, read long after. On a CPU it is the host's time.

    Args:
        device: device that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[_Span] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside under the name of a phase."""
        start = self._mark()
        yield
        self._spans.append(_Span(phase, start, self._mark()))

    def read(self) -> dict[str, float]:
        """Read the seconds by phase and reset them. On a GPU it waits for the last phase."""
        spans, self._spans = self._spans, []
        seconds: dict[str, float] = {}
        for phase, start, end in spans:
            seconds[phase] = seconds.get(phase, 0.0) + _between(start, end)
        return seconds

    def _mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _between(start: Mark, end: Mark) -> float:
    if isinstance(end, float):
        assert isinstance(start, float), "both marks are of one device"
        return end - start
    assert isinstance(start, torch.cuda.Event), "both marks are of one device"
    end.synchronize()
    return start.elapsed_time(end) / 1000
