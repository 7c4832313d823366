"""Settings of Ray Tune for a sweep, without a cluster."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from support.toy_trials import SWEEP, toy_sweep_file

from ray_jobs.runtime.resources import Resources
from ray_jobs.tune import callbacks, search, shared_tasks
from vavae.config import load
from vavae.errors import UserError
from vavae.runs.config import RunConfig
from vavae.sweep.sharing import Sharing
from vavae.sweep.sweep import Sweep, name_of_trial
from vavae.sweep.trial import Entry, write_entry

_BASE = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.fixture
def sweep_of(tmp_path: Path):
    def sweep_of(*overrides: str) -> Sweep:
        return Sweep.load(toy_sweep_file(tmp_path, _BASE, SWEEP), [f"run.storage.root={tmp_path}", *overrides])

    return sweep_of


def _peak(sweep: Sweep) -> Resources:
    return search.peak_resources(sweep.run_config(sweep.points()[0], 0))


@pytest.mark.parametrize(
    ("overrides", "cpus", "gpus"),
    [
        (["workers.count=2"], 2, 0),
        (["workers.cpus=3", "latents.cpus=0.5", "sample.actors=2"], 6, 0),
        (["latents.actors=9", "latents.cpus=0.5"], 4.5, 0),
        (["workers.use_gpu=true", "sample.actors=1", "latents.actors=2"], 2, 2),
        (["workers={use_gpu: true, gpus: 0.5}", "sample.actors=1", "latents={actors: 1, gpus: 0.25}"], 1, 0.5),
    ],
)
def test_a_trial_counts_with_the_most_that_any_of_its_jobs_takes(overrides: list[str], cpus: float, gpus: float):
    config = load(RunConfig, _BASE, ["latents.actors=1", *overrides])
    assert search.peak_resources(config) == (cpus, gpus)


@pytest.mark.parametrize(
    ("there", "wanted", "expected"), [({"CPU": 2}, None, 1), ({"CPU": 7}, None, 3), ({"CPU": 7}, 2, 2), ({}, None, 1)]
)
def test_as_many_trials_as_fit_go_on_at_once(sweep_of, monkeypatch, there, wanted, expected):
    monkeypatch.setattr(search.ray, "cluster_resources", lambda: there)
    peak = _peak(sweep_of())
    assert peak == (2, 0), "two actors sample in the tiny configuration"
    assert search.concurrent_trials(sweep_of(f"max_concurrent={wanted or ''}"), peak) == expected


def test_three_trials_of_the_dilemma_share_one_gpu():
    sweep = Sweep.load(_BASE.parent / "sweeps" / "dilemma_cifar10_gpu.yaml")
    assert sweep.config.max_concurrent is not None
    assert _peak(sweep).gpus * sweep.config.max_concurrent <= 1


def test_trials_of_other_budgets_request_the_same_tokenizer_once_and_trainings_of_their_own(tmp_path: Path):
    sharing = Sharing(str(tmp_path / "shared"))

    def keys(task: str) -> set[str]:
        budgets = [f"train_lightningdit.images={images}" for images in (64, 128)]
        configs = [load(RunConfig, _BASE, [f"storage.root={tmp_path}", budget]) for budget in budgets]
        return {shared_tasks._task_key(sharing, config, task) for config in configs}

    assert {task: len(keys(task)) for task in ("prepare_shards", "train_vavae", "train_lightningdit")} == {
        "prepare_shards": 1,
        "train_vavae": 1,
        "train_lightningdit": 2,
    }


def test_more_than_fit_are_refused(sweep_of, monkeypatch):
    monkeypatch.setattr(search.ray, "cluster_resources", lambda: {"CPU": 3})
    sweep = sweep_of("max_concurrent=2")
    with pytest.raises(UserError, match="max_concurrent=2: a trial takes up to 2 CPUs and 0 GPUs, of which"):
        search.concurrent_trials(sweep, _peak(sweep))


def test_a_worker_with_a_share_of_a_gpu_is_alone(sweep_of):
    with pytest.raises(UserError, match=r"gpus=0\.5 with count=2"):
        sweep_of("run.workers={use_gpu: true, gpus: 0.5, count: 2}")


def test_settled_points_are_left_out_unless_others_are_judged_by_them(sweep_of):
    sweep = sweep_of()
    points = sweep.points()
    for point, state in zip(points, ("finished", "stopped", "failed", "running"), strict=True):
        write_entry(sweep, Entry(point, state))
    assert search.points_to_run(sweep) == points[2:]
    judged = sweep_of("objectives=[generation_frechet_distance]", "early_stopping={rule: median}")
    assert search.points_to_run(judged) == points


def test_trackers_are_looked_for_before_anything_starts(sweep_of, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert len(callbacks.tune_callbacks(sweep_of())) == 1
    for tool in ("mlflow", "wandb"):
        with pytest.raises(UserError, match=f"{tool} is not installed: pip install -e '.\\[{tool}\\]'"):
            callbacks.tune_callbacks(sweep_of(f"tracking=[{tool}]"))


def test_trackers_are_rays_own_callbacks(sweep_of, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for tool, name in (("mlflow", "MLflowLoggerCallback"), ("wandb", "WandbLoggerCallback")):
        monkeypatch.setattr(f"ray.air.integrations.{tool}.{name}", lambda **settings: settings)
    found = callbacks.tune_callbacks(sweep_of("tracking=[mlflow, wandb]"))
    assert found[1:] == [{"experiment_name": "toy"}, {"project": "toy"}]


def test_optuna_chooses_in_the_space_and_sees_conditions(sweep_of):
    asked = []

    class Choosing:
        def suggest_categorical(self, name, options):
            asked.append((name, options))
            return options[-1]

        def suggest_float(self, name, low, high, log):
            asked.append((name, low, high, log))
            return low

    sweep = SimpleNamespace(space=sweep_of().space)
    search._suggest(sweep, Choosing())
    assert asked == [("point/tokenizer.latent_dim", ["4", "8"]), ("point/lightningdit.depth", ["2", "3"])]


def test_trials_are_named_after_their_points(sweep_of):
    point = sweep_of().points()[0]
    assert search.name_of(SimpleNamespace(config={"point": point})) == name_of_trial(point)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("first\n  second: here \n"), "second: here"),
        (ValueError(), "ValueError"),
        (UserError("a.yaml:3: wrong"), "a.yaml:3: wrong"),
    ],
)
def test_the_reason_of_a_failure_is_its_last_line(error, reason):
    assert search._reason(error) == reason
