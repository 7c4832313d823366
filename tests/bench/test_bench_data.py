"""The benchmark of the data pipeline: its sides agree before they are measured, and its ratios are of equal work."""

import tracemalloc
from importlib import metadata

import pytest

from vavae.bench import benchmark as benchmark
from vavae.bench.benchmark import Benchmark, Row, Skipped, run_interleaved, table_head, table_line
from vavae.bench.data import local, run, start, store
from vavae.bench.data.run import Sizes
from vavae.cli.main import main
from vavae.data.config import StreamConfig
from vavae.data.sample_order import order_of

SMALL = Sizes(images=32, latents=64, shards=40)
BENCHMARKS = {
    ("tar records", "webdataset"),
    ("JPEG batches", "webdataset"),
    ("JPEG batches", "bare decoder"),
    ("latent batches", "webdataset"),
    ("start, 2,560 latents", "an entry each"),
    ("memory over an epoch", ""),
}


def test_the_command_prints_a_table_with_a_line_for_every_benchmark(monkeypatch, capsys):
    hold, reason = run.run, "no server here"
    monkeypatch.setattr(run, "run", lambda rounds, sizes: hold(rounds, SMALL))
    monkeypatch.setattr(store, "why_no_s3_server", lambda: reason)
    assert main(["bench", "data", "--rounds", "1"]) == 0
    machine, _, head, rule, *lines, last = capsys.readouterr().out.splitlines()
    assert f"torch {metadata.version('torch')}, webdataset" in machine  # torch's own has the build behind it
    assert f"{head}\n{rule}" == table_head()
    assert last == f"S3 stream is left out: {reason}"
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    assert {(row[0], row[2]) for row in rows} >= BENCHMARKS
    for row in rows:
        if row[2]:
            low, high = map(float, row[6].split(" to "))
            assert 0 < low <= float(row[5].removesuffix("x")) <= high


def test_both_epochs_of_a_store_are_read(tmp_path):
    if store.why_no_s3_server():
        pytest.skip(store.why_no_s3_server())
    rows = [row for benchmark in store.store_benchmarks(tmp_path, 32) for row in run_interleaved(benchmark, 1).rows()]
    assert [(row.benchmark, row.against) for row in rows] == [
        ("S3 stream, first epoch", "webdataset"),
        ("S3 stream, second epoch", "webdataset"),
    ]


def side(clock, turns, name, seconds):
    def work():
        clock[0] += seconds
        turns.append(name)
        return 10

    return benchmark.processor_rate(work)


def test_sides_take_turns_and_the_ratio_is_of_samples_per_second(monkeypatch):
    clock, turns = [0.0], []
    monkeypatch.setattr(benchmark.time, "process_time", lambda: clock[0])
    sides = {
        "a": side(clock, turns, "a", 2.0),
        "b": side(clock, turns, "b", 1.0),
        "vavae": side(clock, turns, "vavae", 0.5),
    }
    assert run_interleaved(Benchmark("x", "img/s", sides), 3).rows() == [
        Row("x", "img/s", "a", 5, 20, (4, 4, 4)),
        Row("x", "img/s", "b", 10, 20, (2, 2, 2)),
    ]
    assert turns == ["a", "b", "vavae"] * 4, "a warm-up and three rounds"


def test_where_less_is_better_the_ratio_is_turned():
    (row,) = run_interleaved(
        Benchmark("x", "s", {"a": lambda: 6.0, "vavae": lambda: 2.0}, less_is_better=True), 1
    ).rows()
    assert row.ratios == (3,)


def test_a_line_has_medians_and_the_range():
    row = Row("tar records", "img/s", "webdataset", 12345.6, 99.994, (8.0, 9.5, 10.25))
    cells = [cell.strip() for cell in table_line(row).strip("| ").split("|")]
    assert cells == ["tar records", "img/s", "webdataset", "12,346", "99.99", "9.50x", "8.00 to 10.25"]
    assert (
        len(table_line(row)) == len(table_line(Row("x", "MiB", "", None, 0.5, ()))) == len(table_head().split("\n")[1])
    )


def test_unequal_outputs_are_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "places", lambda shards, steps: list(range(32)))
    with pytest.raises(AssertionError, match="webdataset decodes other pixels"):
        list(local.image_benchmarks(tmp_path / "images", 32))
    with pytest.raises(AssertionError, match="webdataset reads other latents"):
        list(local.latent_benchmarks(tmp_path / "latents", 32))


def test_where_linux_does_not_tell_memory_starting_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(start, "STATUS", tmp_path / "missing")
    (found,) = start.start_benchmarks(tmp_path, 64, 40)
    assert isinstance(found, Skipped)


def test_the_memory_of_an_order_is_of_its_shards_not_of_its_records():
    def peak(records_per_shard):
        tracemalloc.start()
        order_of([records_per_shard] * 1000, 0, StreamConfig()).micro_batch(0, 0, 32)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(100_000) < 1.1 * peak(1000) < 1 << 20
