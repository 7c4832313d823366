"""A training on a cluster whose nodes, drivers and owners come and go."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import ray
from ray.cluster_utils import Cluster
from support.ray_head import unquoted_interpreter
from support.waiting import wait_until

from ray_jobs.runtime.progress_actor import ProgressActor
from vavae.config import load
from vavae.data.shards.write import write_shards
from vavae.runs.config import RunConfig
from vavae.runs.run import Run
from vavae.storage.artifact import read

pytestmark = [pytest.mark.ray, pytest.mark.jobs]

CONFIG = "configs/tiny.yaml"
_PATIENCE_SECONDS = 400
_STARTED = "joining the cluster"
_INTERRUPTED, _REFUSED = 130, 2


class Saved(NamedTuple):
    """The newest checkpoint."""

    images_seen: int = 0
    workers: int = 0


class Training:
    """The tokenizer's training of one run, and the processes that drive it."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self._overrides = [f"storage.root={root}", "name=run", "train_vavae.images=1_000_000"]
        self._log, self._environment = root / "drivers.log", environment
        self.run = Run(load(RunConfig, CONFIG, self._overrides))
        write_shards(self.run.storage, self.run.prefix("prepare_shards"), self.run.config.shards, lambda *_: None)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Drive it by a process of its own."""
        command = [sys.executable, "-m", *arguments, "--config", CONFIG, *self._overrides]
        with self._log.open("ab") as log:
            return subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    def log(self) -> str:
        """Output of all drivers so far."""
        return self._log.read_text()

    def newest(self) -> Saved:
        """The newest committed checkpoint."""
        folder = self.run.storage.child(f"{self.run.training_prefix('train_vavae')}/checkpoints")
        records = [record for name in folder.list() if (record := read(folder, name)) is not None]
        if not records:
            return Saved()
        newest = max(records, key=lambda record: record.images_seen or 0)
        return Saved(newest.images_seen or 0, sum("/generator/" in path for path in newest.files))

    def wait(self, wanted: Callable[[Saved], bool]) -> Saved:
        """Wait for a checkpoint like this."""

        def found() -> Saved | None:
            saved = self.newest()
            return saved if wanted(saved) else None

        return wait_until(found, _PATIENCE_SECONDS, lambda: f"and have {self.newest()}:\n{self.log()[-3000:]}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head without CPUs, and two nodes with one each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", unquoted_interpreter(tmp_path_factory.mktemp("interpreter")))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


@pytest.fixture
def training(cluster: Cluster, tmp_path: Path) -> Training:
    return Training(tmp_path, {**os.environ, "RAY_ADDRESS": cluster.address})


def drain(address: str, node: str) -> None:
    """Tell the cluster that a cloud will take a node away."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node]
    subprocess.run([*command, *reason, "--deadline-remaining-seconds", "600"], check=True, capture_output=True)


def test_a_dry_run_refuses_what_the_cluster_cannot_hold(training: Training) -> None:
    measure = "train_lightningdit.measure={every_images: 64}"
    process = training.start("ray_jobs.pipeline", "--dry-run", measure, "workers.count=2")
    assert process.wait(_PATIENCE_SECONDS) == _REFUSED
    refusal = "error: workers.count=2 needs 2 CPUs, train_lightningdit.measure beside them 1 and the cluster has 2; set"
    assert f"{refusal} train_lightningdit.measure.when=after, add nodes" in training.log()


def test_a_training_outlives_nodes_drivers_and_owners(cluster: Cluster, training: Training) -> None:
    elastic = ("workers.count=2", "workers.min_count=1", "workers.resize_seconds=1")
    often, never = "train_vavae.checkpoint_images=64", "train_vavae.checkpoint_images=10_000_000"
    with ExitStack() as stack:

        def start(*arguments: str) -> subprocess.Popen[bytes]:
            process = training.start(*arguments)
            stack.callback(process.kill)
            return process

        driver = start("ray_jobs.train_vavae", *elastic, often)
        both = training.wait(lambda saved: saved.workers == 2)
        cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
        alone = training.wait(lambda saved: saved.workers == 1)
        assert alone.images_seen > both.images_seen, "it resumed from a checkpoint"
        cluster.add_node(num_cpus=1)
        again = training.wait(lambda saved: saved.workers == 2)
        assert again.images_seen > alone.images_seen

        driver.kill()
        driver.wait()
        before = training.newest()
        driver = start("ray_jobs.train_vavae", "workers.count=2", never)
        training.wait(lambda _: "images/s" in training.log().partition(_STARTED)[2].partition(_STARTED)[2])
        assert training.newest() == before, "no checkpoint is due"
        drain(cluster.address, cluster.list_all_nodes()[-1].node_id)
        noticed = training.wait(lambda saved: saved.images_seen > before.images_seen)

        other = start("vavae", "train", "vavae", "train_vavae.engine.backend=torch", often)
        training.wait(lambda saved: saved.images_seen > noticed.images_seen)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(_PATIENCE_SECONDS) == _REFUSED
        assert f"process {other.pid} on" in training.log()
        assert "resumes this training now, and this attempt ends" in training.log()

        other.send_signal(signal.SIGTERM)
        assert other.wait(_PATIENCE_SECONDS) == _INTERRUPTED
        assert training.newest().workers == 1


def test_what_a_driver_needs_is_on_its_own_node(cluster: Cluster) -> None:
    def node(_actor: object) -> str:
        return ray.get_runtime_context().get_node_id()

    ray.init(address=cluster.address, logging_level="warning")
    try:
        actors = [ProgressActor() for _ in range(8)]
        nodes = ray.get([actor._actor.__ray_call__.remote(node) for actor in actors])
        assert set(nodes) == {node(None)}
    finally:
        ray.shutdown()


def test_ray_is_not_left_behind() -> None:
    assert not ray.is_initialized()
