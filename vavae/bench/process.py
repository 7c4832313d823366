"""Functions in a process of their own, and the memory of a process."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

STATUS = Path("/proc/self/status")
"""File in which Linux tells the memory of a process."""

T = TypeVar("T")


def run_in_process(function: Callable[..., T], *arguments: object) -> T:
    """Run a function of a module in a fresh process, and return its result."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", function.__module__])
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def anonymous_mebibytes() -> float:
    """Memory of this process alone, without mapped files, MiB."""
    return _memory("RssAnon")


def peak_mebibytes() -> float:
    """Peak memory of this process so far, MiB."""
    return _memory("VmHWM")


def _memory(field: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024
