"""The digests of all shipped configurations, which no change to the code may move: runs on storage are found by them.

Where this fails after a field was added: declare it with `vavae.config.added`. Only a changed file in `configs/` is a
reason to write the digests anew, with `python tests/config/test_config_digests.py`.
"""

import json
from pathlib import Path
from uuid import uuid4

import yaml

from vavae.config import digest, load
from vavae.runs.config import RunConfig
from vavae.runs.jobs import JOBS
from vavae.runs.run import Run
from vavae.sweep.sharing import content_key
from vavae.sweep.sweep import Sweep, name_of_trial
from vavae.sweep.trial import Entry, write_entry

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PINNED = Path(__file__).with_name("digests.json")
RUNS = [*sorted(CONFIGS.glob("*.yaml")), *sorted(CONFIGS.glob("imagenet/**/*.yaml"))]
PRESETS = sorted(CONFIGS.glob("presets/**/*.yaml"))
SWEEPS = sorted(CONFIGS.glob("sweeps/*.yaml"))
SHOWN = 16
"""Hexadecimal digits of each digest that are kept."""


def of_run(config):
    """The digests of a configuration: all of it, its shards, what decides each job's artifact, and its last job's."""
    jobs = {job: digest(Run(config).identity(job)) for job in JOBS}
    return {
        "all": digest(config)[:SHOWN],
        "shards": digest(config.shards)[:SHOWN],
        **{job: value[:SHOWN] for job, value in jobs.items()},
        "content": content_key(config, [*JOBS][-1])[:SHOWN],
    }


def of_preset(path, folder):
    """The digests of the quickstart with a preset laid over it, as a run would name it."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({"defaults": [str(CONFIGS / "quickstart.yaml"), str(path)]}))
    return of_run(load(RunConfig, file))


def of_sweep(path):
    """Digests of a sweep by point: the key of its entry in the ledger, and a digest of all those of its runs."""
    sweep = Sweep.load(path, [f"run.storage.root=memory://{uuid4()}"])
    found = {}
    for point in sweep.points() or sweep.space.examples():
        name = name_of_trial(point)
        write_entry(sweep, Entry(point, "running"))
        runs = {"trials": [of_run(run.config) for run in sweep.runs(point)], "full": of_run(sweep.full_config(point))}
        found[name] = [sweep.storage.read_json(f"ledger/{name}.json")["key"][:SHOWN], digest(runs)[:SHOWN]]
    return found


def all_digests(folder):
    """All that is pinned, by the paths of the files."""
    found = {path: of_run(load(RunConfig, path)) for path in RUNS}
    found |= {path: of_preset(path, folder) for path in PRESETS}
    found |= {path: of_sweep(path) for path in SWEEPS}
    return {path.relative_to(CONFIGS).as_posix(): digests for path, digests in found.items()}


def test_no_digest_of_a_shipped_configuration_moves(tmp_path):
    pinned, found = json.loads(PINNED.read_text()), all_digests(tmp_path)
    assert [*found] == [*pinned], "a file came or went: write the digests anew"
    moved = {path: [key for key in pinned[path] if found[path].get(key) != pinned[path][key]] for path in pinned}
    assert not {path: keys for path, keys in moved.items() if keys or [*found[path]] != [*pinned[path]]}


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        lines = [f"{json.dumps(path)}: {json.dumps(digests)}" for path, digests in all_digests(Path(scratch)).items()]
    PINNED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
