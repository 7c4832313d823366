"""Benchmark of a whole training under Ray, against the same one without."""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial

from vavae.bench.benchmark import VAVAE_SIDE, Benchmark
from vavae.config.load import load
from vavae.data.shards.write import write_shards
from vavae.errors import UserError
from vavae.runs.config import RunConfig
from vavae.runs.run import Run
from vavae.training.logging.log import read_rows

_MODULES = {VAVAE_SIDE: ("ray_jobs.train_vavae",), "a bare loop": ("vavae", "train", "vavae")}
"""Module and arguments of each side."""
_FIRST_ROWS = 2
"""Rows that do not count."""


def ray_benchmark(config: str, overrides: Sequence[str]) -> Benchmark:
    """Benchmark of the tokenizer's training as a job of Ray and as a process of its own.

    Each turn is a training from start to end; its value is the median rate of the rows of its log. Between two rows
    lies all that a training does, its reports to Ray included.

    Args:
        config: file of the configuration of a run.
        overrides: `key=value` over it.
    """
    overrides = [f"workers.threads={os.cpu_count()}", *overrides]
    sides = {side: partial(_rate, module, config, overrides) for side, module in _MODULES.items()}
    return Benchmark("training under Ray", "img/s on the wall", sides)


def _rate(module: Sequence[str], config: str, overrides: Sequence[str]) -> float:
    """Train in an empty folder; returns the median images per second of the rows.

    Raises:
        UserError: the training has failed, or has left too few rows.
    """
    with tempfile.TemporaryDirectory(prefix="vavae-") as folder:
        overrides = [*overrides, f"storage.root={folder}"]
        run = Run(load(RunConfig, config, overrides))
        write_shards(run.storage, run.prefix("prepare_shards"), run.config.shards, lambda done, total: None)
        # A job that is given no address starts a cluster of its own.
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-m", *module, "--config", config, *overrides]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command[1:])}: {done.stderr.strip().rpartition(os.linesep)[2]}")
        rows = read_rows(run.training_folder("train_vavae").child("log"))
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row][_FIRST_ROWS:]
    if not rates:
        raise UserError(f"{len(rows)} rows of the log are too few to measure: lower train_vavae.log_images")
    return statistics.median(rates)
