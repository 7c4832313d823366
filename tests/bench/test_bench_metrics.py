"""The benchmark of metrics: equal work, and a line for every benchmark."""

import importlib.util

import pytest

from vavae.bench import metrics as statistics
from vavae.bench.benchmark import run_interleaved
from vavae.cli.main import main
from vavae.metrics.frechet import Gaussian


def test_the_command_prints_a_line_for_every_benchmark(capsys):
    assert main(["bench", "metrics", "--rounds", "1", "--images", "200", "--dimensions", "16"]) == 0
    machine, _, _, _, *lines = capsys.readouterr().out.splitlines()
    assert "torch-fidelity" in machine
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    assert [row[:3] for row in rows] == [
        ["moments of 200", "s of processor", "torch-fidelity"],
        ["moments of 200", "MiB more", "torch-fidelity"],
        ["distance in 16", "s of processor", "torch-fidelity"],
        ["distance in 16", "s of processor", "scipy sqrtm"],
    ]


def test_the_memory_of_a_turn_is_that_of_the_turn_that_was_timed(monkeypatch):
    costs = iter([statistics._Cost(1.0, 10.0), statistics._Cost(2.0, 20.0), statistics._Cost(3.0, 30.0)])
    monkeypatch.setattr(statistics, "run_in_process", lambda *_: next(costs))
    side = statistics._Side(statistics._streamed_moments, 1, 1)
    assert [side.seconds() for _ in range(3)] == [1, 2, 3]
    assert [side.mebibytes() for _ in range(3)] == [10, 20, 30]


@pytest.mark.parametrize("side", ["_gathered_moments", "_sqrtm_distance"])
def test_unequal_outputs_are_not_measured(monkeypatch, side):
    wrong = {
        "_gathered_moments": lambda images, dimensions: Gaussian(*(2 * part for part in _moments(images, dimensions))),
        "_sqrtm_distance": lambda a, b: 1.0,
    }
    monkeypatch.setattr(statistics, side, wrong[side])
    monkeypatch.setattr(statistics, "run_in_process", lambda *_: statistics._Cost(1.0, 1.0))
    with pytest.raises(AssertionError):
        [run_interleaved(benchmark, 1) for benchmark in statistics.benchmarks(100, 8)]


def _moments(images: int, dimensions: int):
    found = statistics._streamed_moments(images, dimensions)
    return found.mean, found.covariance


def test_without_the_other_side_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "metrics"]) == 2
    assert "pip install -e '.[fidelity]'" in capsys.readouterr().err
