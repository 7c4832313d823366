"""A tokenizer that is trained in phases and stopped anywhere, without Ray."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vavae.config import load
from vavae.data.shards.write import write_shards
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.interop.export import load_alignment, load_exported_tokenizer
from vavae.interop.released_tokenizer import save_released_tokenizer
from vavae.losses.adversarial import PatchDiscriminator
from vavae.runs.config import RunConfig
from vavae.runs.run import Run
from vavae.runs.training_inputs import begin_training
from vavae.storage.artifact import read
from vavae.training import tokenizer_step
from vavae.training.logging.log import read_rows
from vavae.training.session import LocalSession
from vavae.training.train import train

pytestmark = pytest.mark.jobs

_CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
_STEP = 16
_STAGES = (
    "[{from_images: 48, losses: {vision_foundation: {weight: 0.2, cos_margin: 0.3}}, frozen: [projection]},"
    " {from_images: 80, losses: {vision_foundation: {weight: 0}}, frozen: [encoder]}]"
)
_FIELDS = [
    "train_vavae.engine.backend=torch",
    "train_vavae.images=112",
    "train_vavae.ema_decay=0.5",
    "train_vavae.log_images=1",
    "train_vavae.keep_checkpoints=9",
    "train_vavae.discriminator_optimizer={learning_rate: 2e-3}",
    "losses.adaptive={every: 2}",
    f"train_vavae.stages={_STAGES}",
]


class StoppingSession(LocalSession):
    """Asks to stop from one of its steps on."""

    def __init__(self, at_step: int) -> None:
        super().__init__()
        self._left = at_step

    def stop_requested(self) -> bool:
        self._left -= 1
        return self._left <= 0


def _run(root: Path, *overrides: str) -> Run:
    return Run(load(RunConfig, _CONFIG, [f"storage.root={root}", *_FIELDS, *overrides]))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    run = _run(root)
    write_shards(run.storage, run.prefix("prepare_shards"), run.config.shards, lambda *_: None)
    return root


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("straight") / "runs"
    shutil.copytree(shards, root)
    run = _run(root, f"train_vavae.checkpoint_images={_STEP}")
    train(begin_training(run, "train_vavae", World()), LocalSession(), World())
    return run


def _weights(run: Run, images: int, engine: str = "generator") -> dict[str, Tensor]:
    """By name, flattened."""
    folder = Path(run.storage.url(f"{run.training_prefix('train_vavae')}/checkpoints/{images:012d}"))
    (file,) = folder.glob(f"*/{engine}/00000.safetensors")
    state = load_file(file)
    return {name: values for name, values in state.items() if "/" not in name}


def _discriminator(run: Run, images: int) -> dict[str, Tensor]:
    return _weights(run, images, "discriminator")


def _moved(run: Run, since: int, until: int) -> set[str]:
    before, after = _weights(run, since), _weights(run, until)
    return {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}


def test_frozen_parts_alone_do_not_learn(straight: Run) -> None:
    halves = {"encoder", "decoder", "quant_conv", "post_quant_conv"}
    assert _moved(straight, 16, 48) == halves | {"projection"}
    assert _moved(straight, 48, 80) == halves
    assert _moved(straight, 80, 112) == {"decoder", "post_quant_conv"}


def test_each_phase_has_its_losses(straight: Run) -> None:
    rows = read_rows(straight.storage.child(f"{straight.training_prefix('train_vavae')}/log"))
    assert [row["images"] for row in rows] == [*range(_STEP, 112 + 1, _STEP)]
    assert [row["images"] for row in rows if "loss/cosine" in row] == [16, 32, 48, 64, 80]
    weights = {row["images"]: row["adaptive_weight/vf"] for row in rows if "adaptive_weight/vf" in row}
    # Refreshed every second step, and at the first one of a phase.
    assert weights[16] == weights[32] != weights[48]
    assert weights[64] != weights[48] * 2


@pytest.mark.parametrize("stops", [(1,), (2, 1), (3,), (4,), (5, 1)])
def test_stopped_anywhere_it_ends_up_the_same(
    shards: Path, straight: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: tuple[int]
) -> None:
    shutil.copytree(shards, tmp_path / "runs")
    run = _run(tmp_path / "runs", "train_vavae.checkpoint_images=1_000_000")
    for steps in stops:
        train(begin_training(run, "train_vavae", World()), StoppingSession(steps), World())
        assert run.artifact("train_vavae") is None
        # From here on a checkpoint or the phase before gives all weights.
        monkeypatch.setattr(tokenizer_step, "initialized", None)
    train(begin_training(run, "train_vavae", World()), LocalSession(), World())
    ours, theirs = read(run.storage, "tokenizer/export"), read(straight.storage, "tokenizer/export")
    assert ours is not None
    assert theirs is not None
    assert ours.digest == theirs.digest
    theirs_judge = _discriminator(straight, 112)
    assert all(torch.equal(tensor, theirs_judge[name]) for name, tensor in _discriminator(run, 112).items())


def _resume_with_a_flipped_byte(run: Run, checkpoint: str, straight: Run) -> None:
    """Damage a checkpoint of a run, train on, and compare the export with that of an undisturbed run."""
    checkpoints = run.storage.child(f"{run.training_prefix('train_vavae')}/checkpoints")
    file = next(path for path in checkpoints.list(checkpoint, recursive=True) if "/generator/" in path)
    data = checkpoints.read_bytes(file)
    checkpoints.write_bytes(file, data[:-1] + bytes([data[-1] ^ 1]))
    train(begin_training(run, "train_vavae", World()), LocalSession(), World())
    ours, theirs = read(run.storage, "tokenizer/export"), read(straight.storage, "tokenizer/export")
    assert ours is not None
    assert theirs is not None
    assert ours.digest == theirs.digest


def test_a_damaged_checkpoint_of_a_phase_leads_back_to_the_phase_of_the_one_before(
    shards: Path, straight: Run, tmp_path: Path
) -> None:
    shutil.copytree(shards, tmp_path / "runs")
    run = _run(tmp_path / "runs", f"train_vavae.checkpoint_images={2 * _STEP}", "train_vavae.keep_checkpoints=9")
    train(begin_training(run, "train_vavae", World()), StoppingSession(5), World())
    checkpoints = run.storage.child(f"{run.training_prefix('train_vavae')}/checkpoints")
    newest, before = checkpoints.list()[-1], checkpoints.list()[-2]
    assert (int(before), int(newest)) == (48, 64), "the end of a phase, and the middle of the next"
    _resume_with_a_flipped_byte(run, newest, straight)


def test_without_an_intact_checkpoint_it_begins_anew(shards: Path, straight: Run, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "runs")
    run = _run(tmp_path / "runs", "train_vavae.checkpoint_images=1_000_000")
    train(begin_training(run, "train_vavae", World()), StoppingSession(1), World())
    checkpoints = run.storage.child(f"{run.training_prefix('train_vavae')}/checkpoints")
    (only,) = checkpoints.list()
    _resume_with_a_flipped_byte(run, only, straight)


def test_a_smaller_budget_afterwards_exports_what_there_is(straight: Run, tmp_path: Path) -> None:
    shutil.copytree(straight.storage.url(), tmp_path / "runs" / "tiny")
    run = _run(tmp_path / "runs", "train_vavae.images=32")
    before = load_file(run.storage.local_file("tokenizer/export/model.safetensors"))
    shutil.rmtree(run.storage.url("tokenizer/export"))
    train(begin_training(run, "train_vavae", World()), LocalSession(), World())
    after = load_file(run.storage.local_file("tokenizer/export/model.safetensors"))
    assert all(torch.equal(before[name], after[name]) for name in before)


_STILL = ["train_vavae.images=16", "train_vavae.optimizer.learning_rate=1e-12", "train_vavae.stages=[]"]


def _started(shards: Path, root: Path, start: str, *overrides: str) -> Run:
    """A training that begins with given weights and does not move them."""
    shutil.copytree(shards, root)
    run = _run(root, *_STILL, "train_vavae.discriminator_optimizer=null", f"train_vavae.start_from={start}", *overrides)
    train(begin_training(run, "train_vavae", World()), LocalSession(), World())
    return run


def _assert_same_export(ours: Run, theirs: Run) -> None:
    for name in ("model.safetensors", "alignment.safetensors"):
        mine, other = (load_file(run.storage.local_file(f"tokenizer/export/{name}")) for run in (ours, theirs))
        assert all(torch.allclose(mine[key], other[key], atol=1e-9) for key in other)


def test_a_training_begins_with_the_export_of_another(shards: Path, straight: Run, tmp_path: Path) -> None:
    _assert_same_export(_started(shards, tmp_path / "runs", straight.storage.url("tokenizer/export")), straight)


def test_a_training_begins_with_a_released_file(shards: Path, straight: Run, tmp_path: Path) -> None:
    export = straight.storage.child("tokenizer/export")
    judge = PatchDiscriminator(straight.config.losses.adversarial)
    judged = {name.removeprefix("discriminator."): tensor for name, tensor in _discriminator(straight, 112).items()}
    judge.load_state_dict({name: judged[name].view_as(tensor) for name, tensor in judge.state_dict().items()})
    file = tmp_path / "released.ckpt"
    save_released_tokenizer(file, load_exported_tokenizer(export)[0], load_alignment(export), judge)
    run = _started(shards, tmp_path / "runs", str(file))
    _assert_same_export(run, straight)
    weight = "discriminator.main.0.weight"
    assert torch.equal(_discriminator(run, 16)[weight], judged["main.0.weight"])


def test_a_start_without_projection_trains_a_new_one(shards: Path, straight: Run, tmp_path: Path) -> None:
    file = tmp_path / "plain.safetensors"
    save_released_tokenizer(file, load_exported_tokenizer(straight.storage.child("tokenizer/export"))[0])
    run = _started(shards, tmp_path / "runs", str(file))
    ours, theirs = (_weights(each, images) for each, images in ((run, 16), (straight, 16)))
    assert not torch.equal(ours["alignment.projection.weight"], theirs["alignment.projection.weight"])
    assert run.storage.is_file("tokenizer/export/alignment.safetensors")


@pytest.mark.parametrize("kind", ["export", "file"])
def test_a_start_of_another_size_is_refused(shards: Path, straight: Run, tmp_path: Path, kind: str) -> None:
    export, file = straight.storage.child("tokenizer/export"), tmp_path / "plain.safetensors"
    save_released_tokenizer(file, load_exported_tokenizer(export)[0])
    start, message = (
        (export.url(), r"made with tokenizer.latent_dim=4, which is 8 here")
        if kind == "export"
        else (str(file), r"expected .* with tokenizer.latent_dim=8")
    )
    with pytest.raises(UserError, match=message):
        _started(shards, tmp_path / "runs", start, "tokenizer.latent_dim=8")
