"""`vavae average` on snapshots of small models, and who samples, exports and evaluates with what it makes."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import small_models
from support.toy_training import no_log
from support.trained_run import trained_run
from torch import nn

from vavae.cli.main import main
from vavae.config import dump
from vavae.distributed.config import EngineConfig, OptimizerConfig
from vavae.distributed.engine import TorchEngine
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.evaluation.metrics import generation_protocol
from vavae.interop.export import load_exported_lightningdit
from vavae.interop.load import load_lightningdit
from vavae.runs.files import CONFIG
from vavae.runs.run import Run
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.runs.training_config import LightningDiTTrainingConfig
from vavae.training.checkpoints.checkpoint import Checkpoints
from vavae.training.checkpoints.retention import Retention
from vavae.training.checkpoints.state import TrainState
from vavae.training.ema import FurtherAverage
from vavae.training.power_profiles import power_decay

BATCH, STEPS, EVERY = 8, 17, 2
NARROW, WIDE = 0.05, 0.1
END = STEPS * BATCH
"""Images at the last checkpoint, between two snapshots."""


def averaged_run(root: Path) -> Run:
    """A run whose LightningDiT's training kept two averages and their snapshots; its weights grow with the images."""
    run = trained_run(root)
    fields = {
        "averages": [{"name": "narrow", "std": NARROW}, {"name": "wide", "std": WIDE}],
        "average_snapshot_images": EVERY * BATCH,
        "keep_checkpoints": 1,
    }
    training = LightningDiTTrainingConfig.model_validate({**run.config.train_lightningdit.model_dump(), **fields})
    run = Run(run.config.model_copy(update={"train_lightningdit": training}))
    run.storage.write_bytes(CONFIG, dump(run.config).encode())
    module = nn.ModuleDict({"model": small_models.lightningdit()})
    first = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    engine = TorchEngine(module.requires_grad_(True), OptimizerConfig(), EngineConfig(), World(), 1)
    averages = {each.name: FurtherAverage(engine, each, training.batch_size, World()) for each in training.averages}
    step = SimpleNamespace(engines={"lightningdit": engine}, ema=None, averages=averages, state_dict=dict)
    folder = run.training_folder("train_lightningdit")
    fresh = TrainState(images_seen=0, config="c", data="d")
    checkpoints = Checkpoints(folder, fresh, Retention.of(folder, training), World())
    for number in range(1, STEPS + 1):
        for name, tensor in module.state_dict().items():
            tensor.copy_(first[name] * number)
        for average in averages.values():
            average.update_after(number * BATCH)
        if number % EVERY == 0 or number == STEPS:
            checkpoints.save(step, fresh.after(number * BATCH), {}, no_log)
    checkpoints.wait_for_pending_save()
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return averaged_run(tmp_path_factory.mktemp("runs"))


def _growth(run: Run, name: str) -> float:
    """Factor of an average over the first weights, the same for all of them."""
    weights = load_exported_lightningdit(run.stored_lightningdit(name).folder)[0].state_dict()
    first = small_models.lightningdit().state_dict()
    ratios = torch.cat([(weights[key] / first[key]).flatten() for key in first if first[key].abs().min() > 0])
    assert ratios.std() < 1e-4 * ratios.mean()
    return ratios.mean().item()


def test_weights_are_loaded_by_the_name_of_their_average_or_as_they_are_trained(run: Run) -> None:
    first, trained = small_models.lightningdit().state_dict(), load_lightningdit(run, "model").state_dict()
    assert all(torch.equal(trained[name], first[name] * STEPS) for name in first)
    main(["average", run.storage.url(), "--std", str(WIDE), "--name", "another"])
    average = load_lightningdit(run.storage.url(), "another").state_dict()
    expected = load_exported_lightningdit(run.stored_lightningdit("another").folder)[0].state_dict()
    assert all(torch.equal(average[name], expected[name]) for name in first)


def _direct(std: float, steps: int) -> float:
    """The average of 1 to `steps` that a training with this profile would have kept."""
    average = 0.0
    for step in range(1, steps + 1):
        decay = power_decay(std, 1, step)
        average = decay * average + (1 - decay) * step
    return average


@pytest.mark.parametrize(("words", "name", "steps"), [([], "std0.075", STEPS), (["--images", "96"], "std0.075-96", 12)])
def test_a_profile_between_those_kept(
    run: Run, capsys: pytest.CaptureFixture[str], words: list[str], name: str, steps: int
) -> None:
    assert main(["average", run.storage.url(), "--std", "0.075", *words]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    record = run.require_average(name)
    assert line.startswith(f"{run.storage.url(run.average_prefix(name))}: {record.digest[:12]}, std 0.075 after ")
    assert line.endswith(f"sample it with sample.weights={name}")
    assert record.images_seen == steps * BATCH
    assert record.details["averages"] == 2 * -(-steps // EVERY), "of no later moment"
    assert record.digest != run.require("train_lightningdit").digest
    assert _growth(run, name) == pytest.approx(_direct(0.075, steps), rel=0.01)


def test_a_profile_that_was_kept_is_the_average_itself(run: Run) -> None:
    assert main(["average", run.storage.url(), "--std", "0.1", "--name", "same"]) == 0
    assert _growth(run, "same") == pytest.approx(_direct(0.1, STEPS), rel=1e-5)


def test_a_narrow_profile_is_made_with_a_warning(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["average", run.storage.url(), "--std", "0.038"]) == 0
    assert "std 0.038 is much narrower than 0.05, the narrowest that was kept: rounding of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--std", "0.01"], r"--std 0.01 can't be reached from 9 snapshots with std 0.05, 0.1: the nearest profile is"),
        (["--std", "0.3"], r"--std 0.3: give a number between 0 and 0.2887"),
        (["--std", "nan"], r"--std nan: give a number between 0 and"),
        (["--std", "0.1", "--images", "20"], r"--images 20: no snapshot of that moment in .*nearest are of 16, 32"),
        (["--std", "0.1", "--images", "9999"], r"--images 9999: no snapshot .* the nearest are of 96, 112, 128, 136"),
        (["--std", "0.1", "--name", "wide"], r"--name wide: the training keeps an average of that name"),
        (["--std", "0.1", "--name", "../x"], r"--name ../x: give letters, digits"),
    ],
)
def test_a_mistake_is_one_line(run: Run, capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    assert main(["average", run.storage.url(), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(line, error), error


def test_a_run_without_snapshots_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = trained_run(tmp_path, "other")
    assert main(["average", other.storage.url(), "--std", "0.1"]) == 2
    assert "no snapshots of averages by power profiles: train with averages that have a std" in capsys.readouterr().err
    other.storage.delete("lightningdit")
    assert main(["average", other.storage.url(), "--std", "0.1"]) == 2
    assert "no LightningDiT yet; run python -m ray_jobs.train_lightningdit" in capsys.readouterr().err


def test_samples_and_exports_name_the_average(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["average", run.storage.url(), "--std", "0.15", "--name", "mine"]) == 0
    words = ["sample", "--run", run.storage.url(), "--classes", "0", "--seeds", "0-1", "--out"]
    for name, extra in (("export.png", []), ("mine.png", ["sample.weights=mine"])):
        assert main([*words, name, *extra]) == 0
    assert Path("export.png").read_bytes() != Path("mine.png").read_bytes()
    assert "1 classes with 2 seeds, average mine, euler 2 steps" in capsys.readouterr().out
    assert main([*words, "none.png", "sample.weights=his"]) == 2
    assert re.search(r"no average of weights his; there are: .*mine", capsys.readouterr().err)

    of_export, of_mine = (SamplingInputs.at(run.storage.url(), extra) for extra in ([], ["sample.weights=mine"]))
    assert of_export.lightningdit.digest != of_mine.lightningdit.digest == run.require_average("mine").digest
    assert of_export.origin != of_mine.origin
    assert "average" not in generation_protocol(9, of_export.config, None)
    assert generation_protocol(9, of_mine.config, None).startswith(
        "9 class-balanced samples, average mine, euler 2 steps"
    )

    config = str(run.storage.local_file(CONFIG))
    for name, extra in (("export.pt", []), ("mine.pt", ["--weights", "mine"])):
        assert main(["export", "lightningdit", name, "--config", config, *extra]) == 0
    exported, mine = (torch.load(name)["ema"] for name in ("export.pt", "mine.pt"))
    stored = load_file(run.storage.child(run.average_prefix("mine")).local_file("model.safetensors"))
    assert any(not exported[key].equal(mine[key]) for key in exported)
    assert all(mine[key].equal(stored[key]) for key in mine.keys() & stored.keys())
    assert main(["export", "tokenizer", "x.pt", "--config", config, "--weights", "mine"]) == 2
    assert main(["average", run.storage.url(), "--std", "0.12", "--name", "mine"]) == 0
    assert SamplingInputs.at(run.storage.url(), ["sample.weights=mine"]).origin != of_mine.origin, "made again"


def test_an_average_of_another_training_is_refused(tmp_path: Path) -> None:
    run = averaged_run(tmp_path)
    assert main(["average", run.storage.url(), "--std", "0.1", "--name", "mine"]) == 0
    changed = Run.at(run.storage.url(), ["train_lightningdit.ema_decay=0.5"])
    with pytest.raises(UserError, match="the average of weights mine is of another training; run vavae average again"):
        changed.require_average("mine")
    with pytest.raises(UserError, match="no average of weights his; there are: mine"):
        Run.at(run.storage.url(), ["sample.weights=his"]).plans(sources=False)
