"""Sweeps under Ray Tune on one local Ray: on jobs that take no time, and once on real ones."""

import csv
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from support.toy_trials import BROKEN, HOLD, made, toy_functions, toy_sweep_file
from support.waiting import wait_until

from ray_jobs import tune_vf
from ray_jobs.runtime.cluster import cluster
from ray_jobs.tune import shared_tasks
from vavae.config import load
from vavae.progress import Progress
from vavae.runs.config import RunConfig
from vavae.runs.events import read_events
from vavae.runs.run import Run
from vavae.sweep.sweep import Sweep, name_of_trial
from vavae.sweep.trial import Entry, read_ledger, write_entry

pytestmark = [pytest.mark.ray, pytest.mark.jobs]

_ROOT = Path(__file__).parents[2]
_BASE = _ROOT / "configs" / "tiny.yaml"
_PATHS = os.pathsep.join([str(_ROOT), str(_ROOT / "tests")])
_PATIENCE_SECONDS = 300
_OWN = ("train_lightningdit", "sample", "evaluate")
"""Jobs that trials do not share."""


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", _PATHS)  # the toy's jobs are looked up by name
        with cluster(load(RunConfig, _BASE), cpus=2):
            yield


def _sweep(root: Path, text: str, *overrides: str) -> tuple[Sweep, list[str]]:
    """A toy sweep and its arguments on the command line."""
    file, settings = toy_sweep_file(root, _BASE, text), [f"run.storage.root={root}", *overrides]
    return Sweep.load(file, settings), ["--config", str(file), *settings]


def _run(root: Path, arguments: list[str]) -> int:
    return tune_vf.main(arguments, toy_functions(root))


def _states(sweep: Sweep) -> dict[str, str]:
    return {name: entry.state for name, entry in read_ledger(sweep).items()}


_FOUR = """
name: toy
base: {base}
sweep:
  tokenizer.latent_dim: {{grid: [4, 8]}}
  lightningdit.depth: {{grid: [2, 3]}}
rungs: [128]
max_concurrent: 1
"""


def test_a_killed_sweep_resumes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sweep, arguments = _sweep(tmp_path, _FOUR)
    first, second, *_ = map(name_of_trial, sweep.points())
    (tmp_path / HOLD).touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "support.toy_trials", str(tmp_path), *arguments],
        env={**os.environ, "PYTHONPATH": _PATHS}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: process.poll() is not None or _states(sweep).get(second) == "running", _PATIENCE_SECONDS)
        assert process.poll() is None, "it ended by itself"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = made(tmp_path)
    assert _states(sweep) == {first: "finished", second: "running"}
    (tmp_path / HOLD).unlink()
    assert _run(tmp_path, arguments) == 0
    assert set(_states(sweep).values()) == {"finished"}
    after = made(tmp_path)
    assert after[: len(before)] == before
    assert not [line for line in after[len(before) :] if first in line], "what was finished stays"
    once = [line for line in after if not line.startswith(("sample", "evaluate"))]
    assert len(once) == len(set(once)), "nothing is made twice"
    output = capfd.readouterr().out
    assert f"{first}  begins" not in output
    assert f"{second}  begins" in output
    rows = list(csv.DictReader((tmp_path / "toy" / "trials.csv").open()))
    assert [row["images_seen"] for row in rows] == ["128", "256"] * 4

    assert _run(tmp_path, arguments) == 0, "and a finished one says so"
    assert "4 finished" in capfd.readouterr().out
    assert made(tmp_path) == after


def test_a_failed_trial_is_retried_then_marked_failed_and_the_sweep_continues(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "name: toy\nbase: {base}\nsweep: {{lightningdit.depth: {{grid: [4, 2, 3]}}}}\n"
    sweep, arguments = _sweep(tmp_path, text, "retries=1")
    (tmp_path / BROKEN).touch()
    assert _run(tmp_path, arguments) == 1
    broken, *whole = map(name_of_trial, sweep.points())
    assert _states(sweep) == {broken: "failed", **dict.fromkeys(whole, "finished")}
    assert read_ledger(sweep)[broken].why == "RuntimeError: the toy broke"
    assert made(tmp_path).count("failed") == 2, "once, and once again"
    shown = capfd.readouterr()
    assert f"{broken}  is retried  RuntimeError: the toy broke\n" in shown.out
    assert f"{broken}  failed  RuntimeError: the toy broke\n" in shown.out
    assert "1 failed, 2 finished" in shown.out
    assert "Traceback" not in shown.out + shown.err
    assert "RuntimeError: the toy broke" in Path(shown.out.partition("traceback in ")[2].split("\n")[0]).read_text()
    assert "failed RuntimeError: the toy broke" in (tmp_path / "toy" / "frontier.html").read_text()
    assert list((tmp_path / "toy" / "tune").glob("*/events.out.tfevents*")), "TensorBoard has the trials"

    (tmp_path / BROKEN).unlink()
    before = made(tmp_path)
    assert _run(tmp_path, arguments) == 0
    assert [line.split()[0] for line in made(tmp_path)[len(before) :]] == ["train_lightningdit", "sample", "evaluate"]


def test_relative_paths_are_those_of_the_folder_the_command_was_typed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = toy_sweep_file(Path(), _BASE, "name: toy\nbase: {base}\nsweep: {{lightningdit.depth: {{grid: [2]}}}}\n")
    assert _run(tmp_path, ["--config", str(file)]) == 0
    sweep = Sweep.load(file)
    (run,) = sweep.runs(sweep.points()[0])
    assert set(_states(sweep).values()) == {"finished"}
    assert (tmp_path / "runs" / "toy" / "trials" / run.config.name / "evaluation").is_dir()
    stored = load(RunConfig, tmp_path / "runs" / "toy" / "best" / f"{name_of_trial(sweep.points()[0])}.yaml")
    assert stored.storage.root == "runs", "as it was written"


def test_a_point_that_makes_no_run_fails_with_its_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    text = """
name: toy
base: {base}
sweep:
  guidance.channels: {{choice: [2, 8]}}
  tokenizer.latent_dim: {{choice: [8, 4]}}
search: {{method: optuna, trials: 1}}
"""
    sweep, arguments = _sweep(tmp_path, text, "retries=0")
    refused = {"guidance.channels": "8", "tokenizer.latent_dim": "4"}
    write_entry(sweep, Entry(refused, "failed"))  # Optuna begins with it
    capfd.readouterr()
    assert _run(tmp_path, arguments) == 1
    why = "guidance.channels=8 exceeds tokenizer.latent_dim=4"
    (entry,) = read_ledger(sweep).values()
    assert (entry.state, entry.point) == ("failed", refused)
    assert why in entry.why
    shown = capfd.readouterr()
    assert f"{name_of_trial(refused)}  failed  {entry.why}\n" in shown.out
    assert "raceback" not in shown.out + shown.err, "it is a user's error"
    assert why in (tmp_path / "toy" / "frontier.html").read_text()
    assert tune_vf.main([*arguments, "--dry-run"]) == 0


def test_optuna_resumes_from_former_points(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    text = """
name: toy
base: {base}
sweep:
  tokenizer.latent_dim: {{choice: [4, 8]}}
  train_lightningdit.optimizer.learning_rate: {{loguniform: [1e-4, 1e-3]}}
search: {{method: optuna, trials: 2}}
max_concurrent: 1
"""
    sweep, arguments = _sweep(tmp_path, text)
    assert _run(tmp_path, arguments) == 0
    before, lines = read_ledger(sweep), made(tmp_path)
    assert set(_states(sweep).values()) == {"finished"}
    assert len(before) == 2
    assert _run(tmp_path, [*arguments, "search.trials=3"]) == 0
    after = read_ledger(sweep)
    assert before.items() < after.items()
    assert len(after) == 3
    new = made(tmp_path)[len(lines) :]
    assert sum(line.startswith("train_lightningdit") for line in new) == 1, "only the third was run"


def test_asha_ends_what_is_worse_at_a_rung(tmp_path: Path) -> None:
    sweep, arguments = _sweep(
        tmp_path,
        _FOUR,
        "objectives=[generation_frechet_distance]",
        "early_stopping={rule: asha, reduction_factor: 2}",
        "rungs=[64, 128]",
    )
    assert _run(tmp_path, arguments) == 0
    # The toy's distances at the first rung, in order: 31, 21, 62, 42; of two, the better continues.
    states = _states(sweep)
    assert [states[name_of_trial(point)] for point in sweep.points()] == ["finished", "finished", "stopped", "stopped"]
    assert {entry.why for entry in read_ledger(sweep).values()} == {"", "by asha"}
    config = load(RunConfig, tmp_path / "toy" / "best.yaml")
    assert (config.tokenizer.latent_dim, config.lightningdit.depth) == (4, 3)


def test_more_trials_at_once_than_there_is_room_for_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, arguments = _sweep(tmp_path, _FOUR, "max_concurrent=9999")
    assert _run(tmp_path, arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: max_concurrent=9999: a trial takes up to 2 CPUs and 0 GPUs")
    assert error.count("\n") == 1


def test_progress_of_tasks_is_shown_and_their_events_are_written_down(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_tasks, "_SHOW_SECONDS", 0.2)
    sweep, arguments = _sweep(tmp_path, "name: toy\nbase: {base}\nsweep: {{lightningdit.depth: {{grid: [3]}}}}\n")
    (run,) = sweep.runs(sweep.points()[0])
    (tmp_path / HOLD).touch()

    line = f"\n{run.config.name}  {Progress('train_lightningdit', 64, 256).line()}\n"

    def release_when_shown() -> None:
        try:
            wait_until(lambda: line in output.getvalue(), _PATIENCE_SECONDS)
        finally:
            (tmp_path / HOLD).unlink()

    with redirect_stdout(io.StringIO()) as output:
        threading.Thread(target=release_when_shown, daemon=True).start()
        assert _run(tmp_path, arguments) == 0
    assert line in output.getvalue()
    assert "tensorboard" not in (output.getvalue() + capfd.readouterr().out).lower(), "Tune itself is silent"
    events = [(event["event"], event["stage"]) for event in read_events(run.storage)]
    assert events == [(kind, job) for job in _OWN for kind in ("stage_begun", "stage_done")]


def test_the_plan_says_what_is_shared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, arguments = _sweep(tmp_path, _FOUR, "seeds=[0, 1, 2]")
    assert tune_vf.main([*arguments, "--dry-run"]) == 0
    output = capfd.readouterr().out
    assert "image shards: made 1 times for 12 runs" in output
    assert "tokenizer: made 6 times for 12 runs" in output
    assert not made(tmp_path)


def test_two_tiny_trials_from_digits_to_the_frontier(tmp_path: Path) -> None:
    file = str(_ROOT / "configs" / "sweeps" / "tiny.yaml")
    two = ["rungs=[]", "sweep=null", "sweep={guidance.scale: {grid: [1, 2]}}"]
    assert tune_vf.main(["--config", file, f"run.storage.root={tmp_path}", *two]) == 0
    folder = tmp_path / "tiny_sweep"
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [(row["guidance.scale"], row["state"]) for row in rows] == [("1", "finished"), ("2", "finished")]
    for row in rows:
        assert float(row["reconstruction_frechet_distance"]) > 0
        assert float(row["generation_frechet_distance"]) > 0
    assert rows[0]["psnr"] == rows[1]["psnr"]
    assert rows[0]["generation_frechet_distance"] != rows[1]["generation_frechet_distance"]
    runs = [Run(load(RunConfig, path)) for path in sorted(folder.glob("trials/*/config.yaml"))]
    assert all(plan.done for run in runs for plan in run.plans().values()), "every tool finds them finished"
    assert len(runs) == 2
    for made_once in ("shards/train/000000.tar", "lightningdit/export/model.safetensors"):
        files = {path.stat().st_ino for path in folder.glob(f"*/*/{made_once}")}
        assert len(files) == 1, "one file, whatever the number of runs that have it"
    assert (folder / "frontier.png").stat().st_size > 0
