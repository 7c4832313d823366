"""A tokenizer that ZeRO stage 3 trains in shards is exported, probed and previewed with full weights."""

from pathlib import Path

import pytest
import torch
from support.gloo import GlooLauncher

from vavae.config import load
from vavae.data.shards.write import write_shards
from vavae.distributed.world import World
from vavae.interop.export import load_alignment, load_exported_tokenizer
from vavae.metrics.latent_space import LatentProbes
from vavae.runs.config import RunConfig
from vavae.runs.run import Run
from vavae.runs.training_inputs import begin_training
from vavae.training.logging.log import read_rows
from vavae.training.session import LocalSession
from vavae.training.train import train

pytestmark = [pytest.mark.gloo, pytest.mark.jobs]

_TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
_ZERO_STAGE_3 = ["backend=deepspeed", "zero_stage=3", "persistence_threshold=0"]


def tokenizer_run(root: Path, engine: list[str]) -> Run:
    short = [
        "images=16",
        "batch_size=8",
        "probe_images=8",
        "preview_images=16",
        "ema_decay=0.5",
        "optimizer.learning_rate=1e-5",
        *(f"engine.{e}" for e in engine),
    ]
    return Run(load(RunConfig, _TINY, [f"storage.root={root}", *(f"train_vavae.{field}" for field in short)]))


def train_and_export(world: World, root: Path, engine: list[str]) -> None:
    train(begin_training(tokenizer_run(root, engine), "train_vavae", world), LocalSession(), world)


def test_the_export_is_that_of_plain_pytorch(gloo: GlooLauncher, tmp_path: Path) -> None:
    exports, seen = [], []
    for name, engine in (("plain", ["backend=torch"]), ("parts", _ZERO_STAGE_3)):
        run = tokenizer_run(tmp_path / name, engine)
        write_shards(run.storage, run.prefix("prepare_shards"), run.config.shards, lambda *_: None)
        gloo.run(2, train_and_export, tmp_path / name, engine)
        rows = read_rows(run.storage.child(f"{run.training_prefix('train_vavae')}/log"))
        seen.append([value for row in rows for name, value in row.items() if name.startswith("latent/")])
        assert run.storage.list(f"{run.training_prefix('train_vavae')}/previews")
        folder = run.storage.child(run.prefix("train_vavae"))
        exports.append({**load_exported_tokenizer(folder)[0].state_dict(), **load_alignment(folder).state_dict()})
    plain, parts = exports
    assert len(plain) > 100
    torch.testing.assert_close(parts, plain, rtol=0, atol=1e-5)
    assert len(seen[0]) == 2 * len(LatentProbes._fields)
    assert seen[1] == pytest.approx(seen[0], rel=1e-3)
