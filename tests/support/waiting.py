"""Waiting for what another thread or process does."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_LONGEST_PAUSE_SECONDS = 0.1


def wait_until(condition: Callable[[], T], seconds: float = 60.0, why: Callable[[], object] = str) -> T:
    """What the condition returns once it holds; AssertionError, with `why`, if that takes longer than `seconds`."""
    end, pause = time.monotonic() + seconds, 0.001
    while not (found := condition()):
        assert time.monotonic() < end, f"waited for {seconds:g} s {why()}"
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)
    return found
