"""The SLURM batch, with stand-ins for SLURM: two nodes that are this machine."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.ray_head import unquoted_interpreter
from support.waiting import wait_until

from vavae.cli.status import run_status
from vavae.config import load
from vavae.data.shards.write import write_shards
from vavae.runs.config import RunConfig
from vavae.runs.run import Run

ROOT = Path(__file__).parents[2]
BATCH = "cluster/slurm/ray.sbatch"
HEAD = "127.0.0.2"
"""Loopback; a name of the usual one Ray would take for the machine's address in its network."""
STAND_INS = {
    "srun": """#!/bin/bash
trap 'kill $(jobs -p) 2>/dev/null' TERM
while [ "${1#-}" != "$1" ]; do shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@" & done
while [ -n "$(jobs -p)" ]; do wait -n || kill $(jobs -p) 2>/dev/null; done
""",
    "scontrol": '#!/bin/bash\necho "$@" >>"$STAND_INS/scontrol.log"\n',
}
OF_RAY = {
    "python": f"""#!/bin/bash
case $1 in
-m) exec {sys.executable} "$STAND_INS/job.py" "$@" ;;
*) PYTHONPATH=$STAND_INS/modules exec {sys.executable} "$@" ;;
esac
""",
    "job.py": """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
print("job", *sys.argv[1:], os.environ["RAY_ADDRESS"], flush=True)
time.sleep(float(os.environ["JOB_SECONDS"]))
sys.exit(int(os.environ["JOB_STATUS"]))
""",
    "ray": f"""#!{sys.executable}
import json, os, pathlib, signal, socket, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
options = sys.argv[2:]
here = pathlib.Path(os.environ["STAND_INS"], f"node-{{os.environ['SLURM_NODEID']}}.json")
token = pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"])
if "--head" in options:
    head = socket.create_server(("127.0.0.2", int(options[options.index("--port") + 1])))
here.write_text(json.dumps({{"options": options, "token": token.read_text(), "mode": token.stat().st_mode & 0o777}}))
if os.environ.get("LOST_NODE") == os.environ["SLURM_NODEID"]:
    print("out of memory")
    sys.exit(1)
time.sleep(60)
""",
    "modules/ray/__init__.py": """
import os, pathlib
init = lambda **_: None
nodes = lambda: [{"Alive": True} for _ in pathlib.Path(os.environ["STAND_INS"]).glob("node-*.json")]
""",
    "modules/ray/util.py": 'get_node_ip_address = lambda: "127.0.0.1"',
}


def slurm(folder: Path, scripts: Mapping[str, str]) -> dict[str, str]:
    """Environment of a batch whose commands are stand-ins."""
    for name, text in scripts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "3", "SLURM_GPUS_ON_NODE": "2"}
    job |= {"HOME": str(folder), "STAND_INS": str(folder), "VAVAE_HEAD_ADDRESS": HEAD}
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return others | job | {"PATH": f"{folder}:{os.environ['PATH']}"}


class Batch:
    """A batch that runs."""

    def __init__(self, environment: dict[str, str], *words: str) -> None:
        self.folder = Path(environment["STAND_INS"])
        self._log = (self.folder / "batch.log").open("w+")
        self.process = subprocess.Popen(
            ["bash", BATCH, *words], cwd=ROOT, env=environment, stdout=self._log, stderr=self._log
        )

    @property
    def log(self) -> str:
        return (self.folder / "batch.log").read_text()

    def signal_at(self, text: str, number: signal.Signals) -> int:
        wait_until(lambda: text in self.log or self.process.poll() is not None, 600, lambda: self.log)
        self.process.send_signal(number)
        return self.process.wait(timeout=300)

    @property
    def requeued(self) -> bool:
        asked = self.folder / "scontrol.log"
        if asked.exists():
            assert asked.read_text() == "requeue 7\n"
        return asked.exists()


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    environment = slurm(tmp_path, STAND_INS | OF_RAY)
    return environment | {"JOB_SECONDS": "30", "JOB_STATUS": "0"}


@pytest.mark.parametrize(("number", "status", "requeued"), [(signal.SIGUSR1, 130, True), (signal.SIGTERM, 130, False)])
def test_a_notice_ends_the_job_and_the_one_before_the_time_limit_queues_it_again(stand_ins, number, status, requeued):
    batch = Batch(stand_ins, "pipeline", "--config", "a file.yaml")
    assert batch.signal_at("job -m", number) == status, batch.log
    assert f"job -m ray_jobs.pipeline --config a file.yaml {HEAD}:" in batch.log
    assert batch.requeued == requeued


def test_nodes_get_what_slurm_gives_them(stand_ins):
    batch = Batch(stand_ins | {"JOB_SECONDS": "0"}, "sample")
    assert batch.process.wait(60) == 0, batch.log
    head, other = (json.loads((batch.folder / f"node-{node}.json").read_text()) for node in range(2))
    for node in (head, other):
        words = " ".join(node["options"])
        assert "--num-cpus 3 --num-gpus 2" in words
        assert node["mode"] == 0o600
        assert node["token"] == head["token"] != ""
        place = Path(node["options"][node["options"].index("--temp-dir") + 1]).parent
        assert not place.exists(), "it is removed at the end"
    address = f"{HEAD}:{head['options'][head['options'].index('--port') + 1]}"
    assert other["options"][-2:] == ["--address", address]
    assert not [*batch.folder.glob(".ray/*")], "the token goes with the cluster"


@pytest.mark.parametrize("status", [1, 2])
def test_a_job_that_fails_gives_the_batch_its_status_and_is_not_queued_again(stand_ins, status):
    batch = Batch(stand_ins | {"JOB_SECONDS": "0.1", "JOB_STATUS": str(status)}, "sample")
    assert batch.process.wait(60) == status, batch.log
    assert not batch.requeued


def test_a_node_on_which_ray_does_not_start_is_named_and_ends_the_batch(stand_ins):
    batch = Batch(stand_ins | {"LOST_NODE": "0"}, "sample")
    assert batch.process.wait(60) not in (0, 130), batch.log
    assert "error: Ray has ended on" in batch.log
    assert "out of memory" in batch.log
    assert "job -m" not in batch.log


def test_without_a_job_it_says_how(stand_ins):
    batch = Batch(stand_ins)
    assert batch.process.wait(60) == 2
    assert batch.log.startswith("error: from the checkout: sbatch [OPTIONS] cluster/slurm/ray.sbatch JOB --config FILE")


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.jobs
@pytest.mark.timeout(1800)
def test_a_training_on_two_nodes_saves_before_the_time_limit_and_resumes(tmp_path):
    environment = slurm(tmp_path, STAND_INS) | {"SLURM_CPUS_ON_NODE": "1", "SLURM_GPUS_ON_NODE": "0"}
    python = Path(unquoted_interpreter(tmp_path))
    environment["PATH"] = f"{python.parent}:{environment['PATH']}"
    words = ["--config", "configs/tiny.yaml", f"storage.root={tmp_path / 'runs'}", "workers.count=2"]
    run = Run(load(RunConfig, words[1], words[2:]))
    write_shards(run.storage, run.prefix("prepare_shards"), run.config.shards, lambda done, total: None)

    endless = [f"train_vavae.{key}=1_000_000" for key in ("images", "checkpoint_images")]
    batch = Batch(environment, "train_vavae", *words, *endless)
    assert batch.signal_at("images/s", signal.SIGUSR1) == 130, batch.log
    assert batch.requeued
    training = run_status(run, run.plans(sources=False))[1].training
    assert training is not None
    assert training.seen > 0

    budget = training.seen + 2 * run.config.train_vavae.batch_size
    batch = Batch(environment, "train_vavae", *words, f"train_vavae.images={budget}")
    assert batch.process.wait(600) == 0, batch.log
    assert run.require("train_vavae").images_seen == budget
