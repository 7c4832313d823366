"""The benchmark of checkpoints runs."""

import torch

from vavae.bench.benchmark import run_interleaved
from vavae.bench.checkpoint import stall_benchmark


def test_a_checkpoint_is_compared_with_writing_it_at_once_and_with_the_copy() -> None:
    with stall_benchmark(2_000_000, torch.device("cpu")) as benchmark:
        rows = run_interleaved(benchmark, rounds=2).rows()
    assert benchmark.name == "checkpoint of 22 MiB"
    assert [row.against for row in rows] == ["writing at once", "the copy alone"]
    assert all(row.vavae > 0 and len(row.ratios) == 2 for row in rows)
