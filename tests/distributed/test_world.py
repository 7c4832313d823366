"""The process group under torchrun, as far as a machine without a GPU can show it."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from vavae.distributed.world import process_group


@pytest.mark.parametrize("use_gpu", [False, True])
def test_a_rank_of_torchrun_selects_its_gpu_before_it_joins(monkeypatch: pytest.MonkeyPatch, use_gpu: bool) -> None:
    calls: list[Any] = []
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: calls.append((backend, options)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with process_group(use_gpu, timeout_seconds=2400.0):
        pass
    device, timeout = torch.device("cuda", 3), timedelta(seconds=2400)
    on_gpu = [device, ("nccl", {"timeout": timeout, "device_id": device})]
    assert calls == (on_gpu if use_gpu else [("gloo", {"timeout": timeout})])
