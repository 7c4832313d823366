"""Functions run in fresh processes that talk through gloo.

One fork server per test session imports torch and DeepSpeed, which takes seconds, and forks the ranks of each call from
itself: every call gets new processes and a new process group for a few milliseconds.
"""

import importlib
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

_SECONDS = 240.0
_GRACE_SECONDS = 5.0
"""How long the other ranks may go on after one has failed; they may wait for it in vain."""
_LEAVE = b"leave"
_IMPORTS = (
    "vavae.training.train",
    "vavae.distributed.deepspeed_engine",
    # DeepSpeed imports it late; it compiles at import, for which torch loads its compiler.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "support.training_steps",
)


class _Call(NamedTuple):
    world_size: int
    grouped: bool
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class GlooLauncher:
    """Calls importable functions as `function(world, *arguments)` on every rank of a new world."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Not a daemon, which could have no children; it ends when the pipe is closed.
        self._process = context.Process(target=_serve_calls, args=(theirs,))
        self._process.start()
        theirs.close()

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any, grouped: bool = True) -> list[Any]:
        """Results by rank; an error of a rank is raised here. `grouped=False` leaves the group to the callee."""
        self._pipe.send_bytes(pickle.dumps(_Call(world_size, grouped, function, arguments)))
        results = pickle.loads(self._pipe.recv_bytes())
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def close(self) -> None:
        """End the fork server."""
        self._pipe.close()
        self._process.join()


def _serve_calls(pipe: Connection) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    for module in _IMPORTS:
        importlib.import_module(module)
    importlib.import_module("torch").set_num_threads(1)
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            os._exit(0)  # tidying up after torch's compiler takes seconds
        pipe.send_bytes(pickle.dumps(_fork_ranks(pickle.loads(message))))


def _fork_ranks(call: _Call) -> list[Any]:
    context, port = multiprocessing.get_context("fork"), _free_port()
    ranks, pipes = [], []
    for rank in range(call.world_size):
        ours, theirs = context.Pipe()
        ranks.append(context.Process(target=_rank, args=(theirs, rank, port, call)))
        ranks[-1].start()
        theirs.close()
        pipes.append(ours)
    results: dict[int, Any] = {}
    deadline = time.monotonic() + _SECONDS
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], deadline - time.monotonic())
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                results[rank] = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                results[rank] = RuntimeError(f"rank {rank} died")
            if isinstance(results[rank], BaseException):
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if not ready:
            break
    for process, pipe in zip(ranks, pipes, strict=True):
        if len(results) < len(pipes):
            process.kill()
        with suppress(BrokenPipeError, ConnectionResetError):  # it died
            pipe.send_bytes(_LEAVE)
    for process in ranks:
        process.join()
    errors = {rank: result for rank, result in results.items() if isinstance(result, BaseException)}
    missing = next(iter(errors.values()), TimeoutError(f"no answer within {_SECONDS} s"))
    return [results.get(rank, missing) for rank in range(call.world_size)]


def _rank(pipe: Connection, rank: int, port: int, call: _Call) -> None:
    import torch.distributed as dist

    from vavae.distributed.world import World

    try:
        if call.grouped:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(call.world_size), **address)
            dist.init_process_group("gloo")
        result = call.function(World.current(), *call.arguments)
    except BaseException as error:  # noqa: BLE001  # handed to the test, whatever it is
        error.args = (*error.args, traceback.format_exc())
        result = error
    pipe.send_bytes(pickle.dumps(result))
    if not isinstance(result, BaseException):
        # Until all have come to their end: one that leaves the last collective first may break it for the others.
        pipe.poll(_SECONDS)
    os._exit(0)  # without waiting for a group whose other ranks may be gone


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
