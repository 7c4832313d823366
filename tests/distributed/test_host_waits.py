"""Number of times that the host waits for the device within a step: reads of tensors that would wait on a GPU."""

import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.engine_parity import TORCH, ZERO
from support.gloo import GlooLauncher
from support.toy_training import ToyStep, train_toy
from support.training_steps import JOBS, LANES, build_step, tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import assign_lanes
from vavae.distributed.world import PendingSums, World
from vavae.storage.storage import Storage

pytestmark = pytest.mark.gloo

_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default}
"""Operators whose result the host sees: a number, a comparison, a size."""


_OF_DEEPSPEED = {
    "train_vavae/zero1": 2,
    "train_vavae/zero2": 2,
    "train_vavae/zero3": 104,  # nearly all for norms of single tensors
    "train_lightningdit/zero1": 2,
    "train_lightningdit/zero2": 2,
    "train_lightningdit/zero3": 1,
}
"""Reads of DeepSpeed 0.19 itself in one step, most of them to find out whether a norm is finite."""


class Waits(TorchDispatchMode):
    """Counts reads of tensors by the host, by the file that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.by_file: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in _READS:
            self.note()
        return operator(*args, **(kwargs or {}))

    def note(self) -> None:
        """Count a read."""
        files = [frame.filename for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        inside = [name for name in files if "vavae/" in name or "deepspeed/" in name]
        self.by_file[inside[-1].rpartition("deepspeed/runtime/")[2] if inside else files[-1]] += 1

    def noting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Count each call of a method of tensors as a read."""

        def noted(*arguments: Any, **named: Any) -> Any:
            self.note()
            return method(*arguments, **named)

        return noted


def waits(world: World) -> dict[str, Counter[str]]:
    """Reads of the second step of each training, by training and engine."""
    found = {f"{job}/{_name(engine)}": _waits(world, job, engine) for job in JOBS for engine in (TORCH, *ZERO)}
    muon = {f"muon/{_name(engine)}": _waits(world, "train_lightningdit", engine, {}) for engine in (TORCH, ZERO[0])}
    return found | muon


def _name(engine: dict[str, Any]) -> str:
    return f"zero{engine['zero_stage']}" if engine["backend"] == "deepspeed" else "torch"


def _waits(world: World, job: Any, engine: dict[str, Any], muon: dict[str, Any] | None = None) -> Counter[str]:
    step = build_step(job, tiny_config(engine=engine, optimizer={"muon": muon}), world)
    stream = load_micro_batches(step.source(), assign_lanes(LANES, world.rank, world.size), 0, workers=0)
    step.run(next(stream), 0, 1e-3)
    micro_batches, counted = next(stream), Waits()
    methods = {name: getattr(Tensor, name) for name in ("tolist", "numpy", "cpu")}
    try:
        for name, method in methods.items():
            setattr(Tensor, name, counted.noting(method))
        with counted:
            step.run(micro_batches, LANES, 1e-3)
    finally:
        for name, method in methods.items():
            setattr(Tensor, name, method)
    return counted.by_file


def test_the_host_waits_nowhere_within_a_step_but_in_deepspeed(gloo: GlooLauncher) -> None:
    for name, counted in gloo.run(1, waits)[0].items():
        ours = {file: count for file, count in counted.items() if "vavae/" in file}
        assert not ours, f"{name}: {ours}"
        assert sum(counted.values()) <= _OF_DEEPSPEED.get(name, 0), f"{name}: {counted}"


def test_ranks_exchange_once_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanges, reads = [], []
    begin, read = World.begin_sum, PendingSums.read
    monkeypatch.setattr(World, "begin_sum", lambda *a: exchanges.append("exchange") or begin(*a))
    monkeypatch.setattr(PendingSums, "read", lambda *a: reads.append("read") or read(*a))
    train_toy(Storage("memory://exchanges"), ToyStep(), images=40, log_images=1000)
    steps, row = 10, 1
    assert (len(exchanges), len(reads)) == (steps + row, steps + row)
