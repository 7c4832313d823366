"""A tokenizer that is trained in stages, stopped wherever, without Ray."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vavae.config import load
from vavae.data.writer import write_shards
from vavae.distributed.world import World
from vavae.storage.artefact import read
from vavae.training.config import RunConfig
from vavae.training.jobs import train_vavae
from vavae.training.log import read_rows
from vavae.training.run import Run
from vavae.training.session import LocalSession

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
    train_vavae(run, LocalSession(), World())
    return run


def _weights(run: Run, images: int) -> dict[str, Tensor]:
    folder = Path(run.storage.url(f"{run.training_prefix('train_vavae')}/checkpoints/{images:012d}"))
    state = torch.load(folder / "generator" / "engine.pt", weights_only=True)
    return state["module"]


def _moved(run: Run, since: int, until: int) -> set[str]:
    before, after = _weights(run, since), _weights(run, until)
    return {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}


def test_frozen_parts_alone_do_not_learn(straight: Run) -> None:
    halves = {"encoder", "decoder", "quant_conv", "post_quant_conv"}
    assert _moved(straight, 16, 48) == halves | {"projection"}
    assert _moved(straight, 48, 80) == halves
    assert _moved(straight, 80, 112) == {"decoder", "post_quant_conv"}


def test_each_stage_has_its_losses(straight: Run) -> None:
    rows = read_rows(straight.storage.child(f"{straight.training_prefix('train_vavae')}/log"))
    assert [row["images"] for row in rows] == [*range(_STEP, 112 + 1, _STEP)]
    assert [row["images"] for row in rows if "loss/cosine" in row] == [16, 32, 48, 64, 80]
    weights = {row["images"]: row["adaptive_weight/vf"] for row in rows if "adaptive_weight/vf" in row}
    # Refreshed every second step, and at the first one of a stage.
    assert weights[16] == weights[32] != weights[48]
    assert weights[64] != weights[48] * 2


@pytest.mark.parametrize("stops", [(1,), (2, 1), (3,), (4,), (5, 1)])
def test_stopped_anywhere_it_ends_up_the_same(shards: Path, straight: Run, tmp_path: Path, stops: tuple[int]) -> None:
    shutil.copytree(shards, tmp_path / "runs")
    run = _run(tmp_path / "runs", "train_vavae.checkpoint_images=1_000_000")
    for steps in stops:
        train_vavae(run, StoppingSession(steps), World())
        assert run.artefact("train_vavae") is None
    train_vavae(run, LocalSession(), World())
    ours, theirs = read(run.storage, "tokenizer/export"), read(straight.storage, "tokenizer/export")
    assert ours is not None
    assert theirs is not None
    assert ours.digest == theirs.digest
    moments = [
        torch.load(
            Path(each.storage.url(f"{each.training_prefix('train_vavae')}/checkpoints/{112:012d}"))
            / "discriminator/engine.pt",
            weights_only=True,
        )["module"]
        for each in (run, straight)
    ]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


def test_a_smaller_budget_afterwards_exports_what_there_is(straight: Run, tmp_path: Path) -> None:
    shutil.copytree(straight.storage.url(), tmp_path / "runs" / "tiny")
    run = _run(tmp_path / "runs", "train_vavae.images=32")
    before = load_file(run.storage.local_file("tokenizer/export/model.safetensors"))
    shutil.rmtree(run.storage.url("tokenizer/export"))
    train_vavae(run, LocalSession(), World())
    after = load_file(run.storage.local_file("tokenizer/export/model.safetensors"))
    assert all(torch.equal(before[name], after[name]) for name in before)
