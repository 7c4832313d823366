"""Turns that have a process to themselves, and the memory of one."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

STATUS = Path("/proc/self/status")
"""Where Linux tells the memory of a process."""

T = TypeVar("T")


def apart(function: Callable[..., T], *arguments: object) -> T:
    """The result of a function of some module in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", function.__module__])
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def own_mebibytes() -> float:
    """What this process alone holds, without mapped files."""
    return _status("RssAnon")


def most_mebibytes() -> float:
    """The most that this process has held at any moment."""
    return _status("VmHWM")


def _status(field: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024
