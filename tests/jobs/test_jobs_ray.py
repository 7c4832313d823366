"""The jobs on a real local Ray with two workers; one cluster for all tests of this file."""

import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import ray
import torch
from support.loader_process import is_alive
from support.metric_names import EXPORTED, OF_NODES, exported_name
from support.sockets import beyond_loopback
from support.trained_run import trained_run
from support.waiting import wait_until

from ray_jobs import evaluate, pipeline, precompute_latents, sample, train_lightningdit, train_vavae
from ray_jobs.runtime import actor_pool, command
from ray_jobs.runtime.checkpoint_evaluation import evaluate_checkpoints_beside
from ray_jobs.runtime.cluster import cluster
from ray_jobs.runtime.progress_monitor import redirect_progress
from ray_jobs.runtime.prometheus import Exporter
from ray_jobs.runtime.resources import Resources
from vavae.config import load
from vavae.progress import Progress
from vavae.report.run_status import run_status
from vavae.runs.config import RunConfig
from vavae.runs.events import read_events
from vavae.runs.jobs import JOBS
from vavae.runs.run import Run
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.sampling.sampler import Sampler
from vavae.storage.artifact import RECORD
from vavae.storage.local import PARTIAL
from vavae.storage.retry import StorageUnavailableError
from vavae.training.checkpoints.metrics import CheckpointMetrics
from vavae.training.collapse import PATIENT_ROWS
from vavae.training.logging.metric_names import JOB_METRICS, METRICS

pytestmark = [pytest.mark.ray, pytest.mark.jobs]

CONFIG = "configs/tiny.yaml"
DESCRIPTION = "test"
FINISHED = "finished"
"""Name of the run that the pipeline makes once for all tests."""
WITHOUT = frozenset(
    exported_name(name, METRICS[name])
    for name in METRICS
    if name.startswith(("gpu_memory/", "storage/"))
    or name in ("model_flop_utilisation", "skipped_steps", "loss_spikes", "unreadable_images")
    or name in ("loss/intermediate", "loss/representation", "loss/class_token", "loss/instantaneous")
)
"""Figures that it has no cause to show: on a CPU, on local storage, with whole images, finite gradients, no recipe."""
SAMPLE = re.compile(r"^(\w+)\{(.*)\} ", re.MULTILINE)


def arguments_of(root: Path, name: str) -> list[str]:
    measure = "train_lightningdit.measure={every_images: 128, images: 20}"
    return ["--config", CONFIG, f"storage.root={root}", f"name={name}", "workers.count=2", "evaluate.actors=2", measure]


@pytest.fixture(scope="module", autouse=True)
def _ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        config = load(RunConfig, CONFIG, arguments_of(tmp_path_factory.getbasetemp(), "any")[2:])
        with cluster(config, evaluation=Resources.for_checkpoint_evaluation(config)):
            yield


def test_ray_listens_on_loopback_alone() -> None:
    assert not beyond_loopback(psutil.Process())


class Scraper:
    """Asks the node for metrics all the time, as Prometheus does, and remembers what it ever saw."""

    def __init__(self, url: str) -> None:
        self._url, self._ended = url, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.seen: dict[str, frozenset[str]] = {}
        """The text of labels of each metric."""

    def names_of(self, run: str) -> set[str]:
        """Names of the metrics that a run ever had."""
        return {name for name, found in self.seen.copy().items() if any(f'run="{run}"' in labels for labels in found)}

    def __enter__(self) -> "Scraper":
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._ended.wait(0.2):
            with suppress(OSError), urllib.request.urlopen(self._url, timeout=5) as answer:
                for name, labels in SAMPLE.findall(answer.read().decode()):
                    self.seen[name] = self.seen.get(name, frozenset()) | {labels}

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.fixture(scope="module", autouse=True)
def scraper(_ray: None) -> Iterator[Scraper]:
    (node,) = ray.nodes()
    with Scraper(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as scraper:
        yield scraper


def run_pipeline(arguments: list[str], *overrides: str) -> int:
    return command.pipeline(DESCRIPTION, pipeline.JOB_FUNCTIONS, [*arguments, *overrides])


class Finished(NamedTuple):
    """A run that the pipeline has finished."""

    folder: Path
    """Folder of the run, for nobody to change."""
    output: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, scraper: Scraper) -> Finished:
    root = tmp_path_factory.mktemp("storage with a space")
    with redirect_stdout(io.StringIO()) as output:
        status = run_pipeline(arguments_of(root, FINISHED))
    assert status == 0, output.getvalue()
    return Finished(root / FINISHED, output.getvalue())


@pytest.fixture
def folder(finished: Finished, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished run for one test, under another name."""
    folder = shutil.copytree(finished.folder, tmp_path / "storage with a space" / "copy")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def arguments(folder: Path) -> list[str]:
    """For the copy."""
    return arguments_of(folder.parent, folder.name)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: RunConfig) -> None:
        raise AssertionError("a job with nothing to do must not ask for a cluster")

    monkeypatch.setattr(command, "cluster", refuse)


def test_pipeline_makes_everything(finished: Finished) -> None:
    folder = finished.folder
    for name in ("samples.png", "reconstructions.png", "report.html", "metrics.jsonl", "config.yaml"):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tensorboard" / "train_vavae").iterdir())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"psnr", "reconstruction_frechet_distance", "alignment_cosine", "generation_frechet_distance"} <= set(
        metrics
    )
    stages = {json.loads(line)["stage"] for line in (folder / "metrics.jsonl").read_text().splitlines()}
    assert stages == {"train_vavae", "train_lightningdit"}
    assert f"report: {folder / 'report.html'}" in finished.output


def test_events_of_the_pipeline_are_in_its_folder(arguments: list[str]) -> None:
    run = Run(load(RunConfig, CONFIG, arguments[2:]))
    events = read_events(run.storage)
    assert (events[0]["event"], events[0]["jobs"], events[-1]["event"]) == (
        "started",
        [*JOBS],
        "done",
    )
    stages = [(event["event"], event["stage"]) for event in events if event["event"].startswith("stage_")]
    assert stages == [(f"stage_{what}", job) for job in JOBS for what in ("begun", "done")]
    checkpoints = [(event["stage"], event["images"]) for event in events if event["event"] == "checkpoint"]
    assert checkpoints == [("train_vavae", images) for images in (64, 128)] + [
        ("train_lightningdit", images) for images in (128, 256)
    ]


def test_checkpoints_are_evaluated_beside_training(arguments: list[str]) -> None:
    run = Run(load(RunConfig, CONFIG, arguments[2:]))
    happened = [event for event in read_events(run.storage) if event["event"] in ("measured", "measure_skipped")]
    done = {event["images"]: event["event"] == "measured" for event in happened}
    assert done.keys() == {128, 256}
    assert any(done.values())
    metrics = CheckpointMetrics.of(run.training_folder("train_lightningdit"), run.config.train_lightningdit)
    assert metrics is not None
    assert {seen: bool(found) for seen, found in metrics.found().items()} == done
    assert b"measured checkpoints" in run.storage.read_bytes("report.html")


def test_an_evaluation_that_takes_too_long_is_skipped(arguments: list[str]) -> None:
    run = Run(load(RunConfig, CONFIG, [*arguments[2:], "train_lightningdit.measure.timeout_seconds=0.01"]))
    place = f"{run.training_prefix('train_lightningdit')}/measures/000000000256.json"
    run.storage.delete(place)
    with evaluate_checkpoints_beside(run):
        pass
    assert run.storage.read_json(place) == {}
    last = read_events(run.storage)[-1]
    assert (last["event"], last["images"]) == ("measure_skipped", 256)
    assert "train_lightningdit.measure.timeout_seconds" in last["why"]


def test_evaluate_takes_the_checkpoints_that_an_interrupted_training_left(arguments: list[str]) -> None:
    run = Run(load(RunConfig, CONFIG, arguments[2:]))
    place = f"{run.training_prefix('train_lightningdit')}/measures/000000000256.json"
    run.storage.delete(place)
    evaluate.work(run)
    assert run.storage.read_json(place)["generation_frechet_distance"]["value"] > 0


def test_prometheus_finds_every_rank_and_every_metric(finished: Finished, scraper: Scraper) -> None:
    expected = EXPORTED - WITHOUT
    wait_until(lambda: scraper.names_of(FINISHED) >= expected, why=lambda: expected - scraper.names_of(FINISHED))
    assert scraper.names_of(FINISHED) == expected
    for stage, rank in itertools.product(("train_vavae", "train_lightningdit"), "01"):
        labels = (f'run="{FINISHED}"', f'stage="{stage}"', f'rank="{rank}"')
        assert any(all(label in found for label in labels) for found in scraper.seen["ray_vavae_loss_total"])
    for job in JOBS:
        labels = (f'run="{FINISHED}"', f'stage="{job}"', 'rank="driver"')
        assert any(all(label in found for label in labels) for found in scraper.seen["ray_vavae_images"])
    wait_until(lambda: scraper.seen.keys() >= OF_NODES)


def test_prometheus_finds_what_other_runs_would_have(scraper: Scraper) -> None:
    Exporter("everything", "test", "driver").show(dict.fromkeys(METRICS | JOB_METRICS, 1.0))
    wait_until(lambda: scraper.names_of("everything") == EXPORTED)
    assert {name for name in scraper.seen if name.startswith("ray_vavae_")} == EXPORTED


def test_finished_pipeline_needs_no_ray(arguments: list[str], no_ray: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_pipeline(arguments) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:6]] == [[job, "done"] for job in JOBS]


def test_deleted_samples_alone_are_made_again(arguments: list[str], folder: Path) -> None:
    run = Run(load(RunConfig, CONFIG, arguments[2:]))
    before = {job: run.require(job).digest for job in JOBS}
    stamps = {job: (folder / run.prefix(job) / "artefact.json").stat().st_mtime_ns for job in JOBS}
    run.storage.delete(run.prefix("sample"))
    assert run_pipeline(arguments, "sample.actors=50") == 0, "more than there is room for is no reason to wait"
    assert {job: run.require(job).digest for job in JOBS} == before
    changed = [job for job in JOBS if (folder / run.prefix(job) / "artefact.json").stat().st_mtime_ns != stamps[job]]
    assert changed == ["sample"]


@contextmanager
def one_killed(
    title: str, when: Callable[[], bool] = lambda: True, by: signal.Signals = signal.SIGKILL
) -> Iterator[None]:
    """Kill the first process of ours that is seen with this title, in the way a node's failure would.

    Args:
        title: the beginning of it; Linux shows 15 letters.
        when: whether it is time.
        by: the signal.
    """
    killed = threading.Event()

    def kill() -> None:
        while not killed.wait(0.02):
            for process in psutil.Process().children(recursive=True) if when() else ():
                with suppress(psutil.NoSuchProcess):
                    if not killed.is_set() and process.name().startswith(title[:15]):
                        process.send_signal(by)
                        killed.set()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    yield
    assert killed.is_set(), "nobody was seen at work"
    killer.join()


@contextmanager
def loader_processes() -> Iterator[dict[int, bool]]:
    """The loader processes below this one: whether each had Ray's library when it was seen last."""
    seen, ended = dict[int, bool](), threading.Event()

    def look() -> None:
        while not ended.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess, OSError):
                    if process.name() == "pt_data_worker":  # so torch calls them
                        seen[process.pid] = "_raylet" in Path(f"/proc/{process.pid}/maps").read_text()

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    yield seen
    ended.set()
    looking.join()


@pytest.mark.parametrize("by", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
def test_deleted_training_comes_back_bit_for_bit_though_a_worker_dies_or_hangs(
    arguments: list[str], by: signal.Signals
) -> None:
    run = Run(load(RunConfig, CONFIG, arguments[2:]))
    before = run.require("train_lightningdit").digest
    run.storage.delete("lightningdit")
    folder = f"{run.training_prefix('train_lightningdit')}/checkpoints"

    def a_checkpoint_is_there() -> bool:
        return any(path.endswith(RECORD) for path in run.storage.list(folder, recursive=True))

    def restarts() -> int:
        return [event["event"] for event in read_events(run.storage)].count("restart")

    known = restarts()
    with one_killed("ray::RayTrainWorker", a_checkpoint_is_there, by), loader_processes() as loaders:
        more = [f"train_lightningdit.{setting}" for setting in ("checkpoint_images=32", "hang_seconds=20")]
        assert run_pipeline(arguments, *more, "stream.workers=2") == 0
    assert restarts() == known + 1
    assert len(loaders) > 2 * 2, "two of each worker, and of those that were restarted"
    assert not any(loaders.values()), "a loader process needs nothing of Ray"
    wait_until(lambda: not any(map(is_alive, loaders)), why=lambda: loaders)
    assert run.require("train_lightningdit").digest == before


def test_torchrun_trains_to_the_same_bits(arguments: list[str]) -> None:
    run = Run(load(RunConfig, CONFIG, arguments[2:]))
    before = run.require("train_lightningdit").digest
    run.storage.delete("lightningdit")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, "-m", "vavae", "train", "lightningdit", *arguments], check=True, timeout=300)
    assert run.require("train_lightningdit").digest == before


def test_latents_survive_a_killed_actor_whatever_their_number(arguments: list[str]) -> None:
    storage = Run(load(RunConfig, CONFIG, arguments[2:])).storage
    before = {path: storage.read_bytes(path) for path in storage.list("latents", recursive=True)}
    storage.delete("latents")

    def a_shard_is_begun() -> bool:
        return any(Path(storage.root, "latents").rglob(f"*{PARTIAL}"))

    with one_killed("ray::Worker", a_shard_is_begun):
        assert run_pipeline(arguments, "latents.actors=1") == 0
    assert {path: storage.read_bytes(path) for path in storage.list("latents", recursive=True)} == before


def test_samples_survive_a_killed_actor_and_come_as_one_array(tmp_path: Path) -> None:
    settings = ["sample.images=60", "sample.shard_images=20", "solver.num_steps=30"]
    config = trained_run(tmp_path / "runs", "trained").storage.local_file("config.yaml")
    run = Run(load(RunConfig, config, settings))

    def a_shard_is_done() -> bool:
        return run.storage.exists("samples/000000.json")

    with one_killed("ray::Worker", a_shard_is_done):
        job = ["--config", str(config), *settings, "sample.actors=1", "sample.npz=true"]
        assert command.main("sample", DESCRIPTION, sample.work, job) == 0
    with np.load(tmp_path / "runs" / "trained" / "samples.npz") as array:
        undisturbed = Sampler.load(SamplingInputs.of(run), torch.device("cpu")).batches(
            range(60), [index % 3 for index in range(60)], run.config.seed, run.config.guidance, run.config.solver, 20
        )
        found = torch.from_numpy(array["arr_0"]).permute(0, 3, 1, 2)
        assert (found.int() - torch.cat(list(undisturbed)).int()).abs().max() <= 1
    assert list(run.require("sample").files) == ["000000.tar", "000001.tar", "000002.tar"]


def test_an_actor_too_large_for_every_node_is_refused(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    storage = Run(load(RunConfig, CONFIG, arguments[2:])).storage
    (record,) = (path for path in storage.list("latents", recursive=True) if path.endswith("artefact.json"))
    storage.delete(record)
    large = [*arguments, "latents.cpus=1e4"]
    assert command.main("precompute_latents", DESCRIPTION, precompute_latents.work, large) == 2
    assert "precompute_latents: an actor needs 10000 CPUs of one node and none has so many" in capfd.readouterr().err


def test_ctrl_c_saves_and_more_images_go_on_from_there_with_another_number_of_workers(
    arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    config = load(RunConfig, CONFIG, arguments[2:])
    before = config.train_lightningdit.images
    interrupted: list[Progress] = []

    def interrupt(moment: Progress | str) -> None:
        if isinstance(moment, Progress) and moment.done > before and not interrupted:
            interrupted.append(moment)
            os.kill(os.getpid(), signal.SIGINT)

    with redirect_progress(interrupt):
        endless = [f"train_lightningdit.{key}=1_000_000" for key in ("images", "checkpoint_images")]
        assert run_pipeline(arguments, *endless) == 130
    run = Run(config)
    (training,) = (stage.training for stage in run_status(run, run.plans()) if stage.job == "train_lightningdit")
    assert training is not None
    assert training.seen > before, "beyond what the run had before"
    budget = training.seen + config.train_lightningdit.batch_size
    assert run_pipeline(arguments, f"train_lightningdit.images={budget}", "workers.count=1") == 0
    run = Run(load(RunConfig, CONFIG, [*arguments[2:], f"train_lightningdit.images={budget}"]))
    assert run.require("train_lightningdit").images_seen == budget
    assert "train_vavae        done" in capfd.readouterr().out


def test_changed_identity_is_refused(arguments: list[str], no_ray: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_pipeline(arguments, "train_vavae.batch_size=64") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "train_vavae.batch_size is 64" in error


def test_job_without_its_input_says_what_to_run(
    arguments: list[str], no_ray: None, capfd: pytest.CaptureFixture[str]
) -> None:
    status = command.main("sample", DESCRIPTION, sample.work, [*arguments, "name=empty"])
    assert status == 2
    assert "run python -m ray_jobs.train_vavae" in capfd.readouterr().err


def test_user_error_of_a_worker_is_one_line(
    arguments: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(load(RunConfig, CONFIG, arguments[2:]))
    shard = folder / "shards" / "train" / "000000.tar"
    whole = shard.read_bytes()
    run.storage.delete(run.prefix("precompute_latents"))
    try:
        shard.write_bytes(bytes(len(whole)))
        status = command.main("precompute_latents", DESCRIPTION, precompute_latents.work, arguments)
    finally:
        shard.write_bytes(whole)
    error = capfd.readouterr().err
    assert status == 2
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert shard.name in error
    assert ray.is_initialized()
    assert run_pipeline(arguments) == 0


@pytest.mark.long
def test_a_collapse_of_the_training_in_workers_is_one_line(
    arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """The last layer begins at zero, and learns nothing at such a rate."""
    run = Run(load(RunConfig, CONFIG, arguments[2:]))
    run.storage.delete("lightningdit")
    settings = ("optimizer.learning_rate=1e-12", "images=4_000", "log_images=32", "collapse_limit=1", "measure=null")
    collapsing = [*arguments, *(f"train_lightningdit.{setting}" for setting in settings)]
    assert command.main("train_lightningdit", DESCRIPTION, train_lightningdit.work, collapsing) == 2
    error = capfd.readouterr().err
    (line,) = (line for line in error.splitlines() if line.startswith("error: "))
    assert re.match(
        r"error: train_lightningdit has collapsed: output_variance is \S+ of the data's, below 0.0001,", line
    )
    assert "Traceback" not in error
    seen = (PATIENT_ROWS + 1) * 32
    happened = [(event["event"], event.get("images")) for event in read_events(run.storage)]
    assert {("collapse", seen), ("checkpoint", seen)} <= {*happened}
    assert happened[-1] == ("failed", None), "and no restart"
    assert run.training_folder("train_lightningdit").is_file(f"checkpoints/{seen:012d}/{RECORD}")


def test_every_job_has_a_dry_run(arguments: list[str], no_ray: None, capfd: pytest.CaptureFixture[str]) -> None:
    for job, module in (("train_vavae", train_vavae), ("evaluate", evaluate)):
        assert command.main(job, DESCRIPTION, module.work, [*arguments, "--dry-run"]) == 0
        assert job in capfd.readouterr().out


def test_an_outage_of_the_store_in_a_worker_is_that_of_the_job() -> None:
    @ray.remote(num_cpus=0)
    def meet_an_outage() -> None:
        raise StorageUnavailableError("s3://bucket/file: no answer")

    with pytest.raises(StorageUnavailableError, match="no answer"), command.unwrap_worker_errors():
        ray.get(meet_an_outage.remote())


def test_after_an_error_what_has_begun_is_finished_and_nothing_waits_for_a_node(tmp_path: Path) -> None:
    class Writer:
        """An actor of a pool, whose items are files that take a while; here, for workers can't import a test."""

        def do(self, file: Path | None) -> str:
            if file is None:
                time.sleep(0.5)
                raise OSError("the disk is full")
            file.write_text("begun")
            time.sleep(2)
            file.write_text("whole")
            return file.name

    def actors(*cpus: float) -> list[Any]:
        return [ray.remote(num_cpus=each, max_restarts=1, max_task_retries=1)(Writer).remote() for each in cpus]

    names = ["b", "a", "c"]
    assert actor_pool._process([tmp_path / name for name in names], actors(0.1, 0.1)) == names
    with pytest.raises(ray.exceptions.RayTaskError, match="the disk is full"):
        actor_pool._process([tmp_path / "d", None, tmp_path / "e", tmp_path / "f"], actors(0.1, 0.1, 1000))
    assert (tmp_path / "d").read_text() == "whole"
    assert not (tmp_path / "e").exists(), "its actor has no node"
    assert not (tmp_path / "f").exists(), "no item is given after an error"
