"""What a sweep takes beside the trials themselves, which take turns with it on one Ray.

    python tests/sweep_overhead.py --rounds 3

One side is `tune_vf`; the other does the same jobs of the same trials in a row, with their shards made once. Both must
come to bitwise identical metrics. Meant for an otherwise idle machine, of two cores or more.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from ray_jobs import tune_vf
from ray_jobs.pipeline import JOB_FUNCTIONS
from ray_jobs.runtime.cluster import cluster
from vavae.bench.benchmark import VAVAE_SIDE, Benchmark, machine, run_interleaved, table_head, table_line
from vavae.runs.jobs import JOBS
from vavae.runs.run import Run
from vavae.sweep.sharing import link_artifact
from vavae.sweep.sweep import Sweep

_FILE = Path(__file__).parents[1] / "configs" / "sweeps" / "tiny.yaml"
# Rungs and thresholds would have trials evaluated more often than a run by itself is.
_ALIKE = ("rungs=[]", "thresholds={}", "max_concurrent=1")

Metrics = list[str]
"""Digests of the evaluation of each trial."""


def sweep_benchmark(folder: Path) -> Benchmark:
    """Seconds that a sweep takes for all its trials, against those of its bare trials."""
    bare: list[Metrics] = []

    def alone() -> float:
        seconds, found = _timed(folder, _bare_trials)
        bare.append(found)
        return seconds

    def vavae_side() -> float:
        seconds, found = _timed(folder, _sweep)
        assert found == bare[-1], "both sides come to the same metrics"
        return seconds

    sides = {"its bare trials": alone, VAVAE_SIDE: vavae_side}
    return Benchmark(f"sweep of {len(_load(folder).points())} trials", "s on the wall", sides, less_is_better=True)


def _timed(folder: Path, go: Callable[[Path], list[Run]]) -> tuple[float, Metrics]:
    """Do all trials in a folder of their own; what that took, and the digests of their evaluations."""
    with tempfile.TemporaryDirectory(dir=folder) as root, open(os.devnull, "w") as nowhere:
        start = time.perf_counter()
        with redirect_stdout(nowhere):
            runs = go(Path(root))
        return time.perf_counter() - start, [run.require("evaluate").digest for run in runs]


def _sweep(root: Path) -> list[Run]:
    status = tune_vf.main(["--config", str(_FILE), *_overrides(root)])
    assert status == 0, f"the sweep ended with status {status}"
    return _runs(root)


def _bare_trials(root: Path) -> list[Run]:
    runs = _runs(root)
    for run in runs:
        for job in JOBS:
            if job == "prepare_shards" and run is not runs[0]:
                link_artifact(runs[0], run, job)
            else:
                JOB_FUNCTIONS[job](run)
    return runs


def _runs(root: Path) -> list[Run]:
    sweep = _load(root)
    return [run for point in sweep.points() for run in sweep.runs(point)]


def _load(root: Path) -> Sweep:
    return Sweep.load(_FILE, _overrides(root))


def _overrides(root: Path) -> list[str]:
    return [f"run.storage.root={root}", *_ALIKE]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(f"{machine('ray')}\n\n{table_head()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="vavae-") as folder, cluster(_runs(Path(folder))[0].config):
        for row in run_interleaved(sweep_benchmark(Path(folder)), rounds).rows():
            print(table_line(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
