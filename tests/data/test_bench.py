"""The benchmark of the data pipeline: its sides agree before they are measured, and its ratios are of equal work."""

import re

import pytest

from vavae.cli import main
from vavae.data import bench


def test_it_prints_a_ratio_for_every_contest(monkeypatch, capsys):
    run = bench.run
    monkeypatch.setattr(bench, "run", lambda rounds: run(rounds, images=32, latents=32))
    assert main(["bench", "data", "--rounds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    names = ["tar records", "JPEG batches", "JPEG batches beside the bare decoder", "latent batches"]
    assert [line.partition(":")[0] for line in lines] == names
    for line in lines:
        low, middle, high = (
            float(re.search(pattern, line)[1]) for pattern in (r"\((\S+)", r"(\S+)x \(", r"to (\S+)\)")
        )
        assert 0 < low <= middle <= high


def test_sides_take_turns_and_the_ratio_is_of_samples_per_second(monkeypatch):
    clock, turns = [0.0], []

    def side(name, seconds):
        def work():
            clock[0] += seconds
            turns.append(name)
            return 10

        return work

    monkeypatch.setattr(bench.time, "process_time", lambda: clock[0])
    result = bench._compete("x", {"webdataset": side("a", 2.0), "vavae": side("b", 0.5)}, 3)
    assert turns == ["a", "b"] * 4, "a warm-up and three rounds"
    assert result.rates == {"webdataset": 5, "vavae": 20}
    assert result.ratios == [4, 4, 4]


def test_unequal_outputs_are_not_measured(monkeypatch):
    monkeypatch.setattr(bench, "_rows", lambda order, batches: list(range(32)))
    with pytest.raises(AssertionError, match="both pipelines decode the same pixels"):
        list(bench.run(1, images=32, latents=32))
