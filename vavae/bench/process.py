"""Functions in a process of their own, and the memory of a process."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

STATUS = Path("/proc/self/status")
"""File in which Linux tells the memory of a process."""

T = TypeVar("T")


def run_in_process(function: Callable[..., T], *arguments: object) -> T:
    """Run a function of a module in a fresh process, and return its result."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", function.__module__])
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def run_within(seconds: float, function: Callable[..., T], *arguments: object) -> T:
    """Run a function of a module in a fresh process, which may have children, and return its result.

    Args:
        seconds: when they are over, the process and all that it has started are killed.
        function: the function.
        arguments: of it.

    Raises:
        TimeoutError: they are over.
        ChildProcessError: the process ended without a result, as where memory ran out.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", function.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise TimeoutError(f"not done within {seconds:g} s")
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(f"ended with status {process.exitcode} and without a result") from None
    finally:
        assert process.pid is not None, "it has been started"
        process.kill()  # it may not have come as far as to its group
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    if error is not None:
        raise error
    return result


def _send_result(sender: Connection, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    os.setsid()  # a group of its own, to be killed with all that it starts
    try:
        sender.send((function(*arguments), None))
    except Exception as error:  # noqa: BLE001 (of any kind: it is the caller's)
        sender.send((None, error))


def anonymous_mebibytes() -> float:
    """Memory of this process alone, without mapped files, MiB."""
    return _memory("RssAnon")


def peak_mebibytes() -> float:
    """Peak memory of this process so far, MiB."""
    return _memory("VmHWM")


def _memory(field: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024
