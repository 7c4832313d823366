"""Training on latents that are not stored: the same samples, and on to the same bits."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import in_process
from support.chain import ImpatientSession
from support.engine_parity import TORCH
from support.training_steps import BATCH, LANES, tiny_config
from torch import Tensor, nn

from vavae.cli.main import main
from vavae.data.image_stream import ImageMicroBatch, MicroBatchKey
from vavae.data.shards.write import write_shards
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.interop.export import load_exported_lightningdit
from vavae.interop.import_export import import_latents
from vavae.latents.manifest import read_latent_manifest, read_latents_of, require_stored
from vavae.latents.stream import LatentMicroBatch
from vavae.planning.sizes import bytes_to_write, feature_bytes, latent_bytes
from vavae.planning.training import frozen_bytes
from vavae.randomness import numpy_generator
from vavae.runs.config import RunConfig
from vavae.runs.run import Run
from vavae.runs.training_inputs import LightningDiTTrainingInputs, begin_training
from vavae.training.flops.flops import encoding_flops, features_flops, training_flops
from vavae.training.logging.log import read_rows
from vavae.training.session import LocalSession
from vavae.training.train import Latents, open_latents, train

STEPS = 3
FEATURES = {"teacher": {"name": "efficientnet_lite0"}}


def configured(root: Path, online: bool) -> RunConfig:
    """A run on 24 images, whose LightningDiT is aligned with features in its first two steps."""
    plain = {"engine": TORCH, "preview_images": None, "checkpoint_images": BATCH, "log_images": BATCH}
    written = tiny_config().model_dump(exclude_unset=True)
    sections: dict[str, Any] = {
        "shards": {"source": str(root / "images"), "shard_images": 6, "validation_fraction": 0.25},
        "storage": {"root": str(root / ("online" if online else "stored"))},
        "train_vavae": {**plain, "probe_images": None, "images": BATCH},
        "latents": {"batch_size": 4, "features": FEATURES, "online": online},
        "objective": {"representation": {"after_block": 1, "projector_width": 16, "stop_images": 2 * BATCH}},
        "train_lightningdit": {**plain, "images": STEPS * BATCH, "ema_decay": 0.5},
        "solver": {"name": "euler", "num_steps": 2},
        "sample": {"images": 4, "shard_images": 2},
    }
    return RunConfig.model_validate(
        {**written, **{name: {**written.get(name, {}), **each} for name, each in sections.items()}}
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A run that stores its latents and features, and one that does not, with the same tokenizer."""
    root = tmp_path_factory.mktemp("online")
    rng = numpy_generator(0, "images")
    for index in range(24):
        folder = root / "images" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    stored, online = (Run(configured(root, each)) for each in (False, True))
    write_shards(stored.storage, stored.prefix("prepare_shards"), stored.config.shards, in_process.ignore)
    train(begin_training(stored, "train_vavae", World()), LocalSession(), World())
    shutil.copytree(root / "stored", root / "online")
    for run in (stored, online):
        in_process.precompute_latents(run)
    return stored, online


def latents_of(run: Run) -> Latents:
    """Latents of a run as its LightningDiT gets them."""
    return open_latents(LightningDiTTrainingInputs.of(run), World())


def test_nothing_is_stored_but_equal_statistics(runs: tuple[Run, Run], capsys: pytest.CaptureFixture[str]) -> None:
    stored, online = (run.folder("precompute_latents") for run in runs)
    assert [path for path in online.list(recursive=True) if path.endswith(".tar")] == []
    assert online.read_bytes("statistics.safetensors") == stored.read_bytes("statistics.safetensors")
    of_images, manifest = runs[1].folder("prepare_shards"), read_latent_manifest(online)
    assert [each.sha256 for each in manifest.splits["train"]] != [
        each.sha256 for each in read_latent_manifest(stored).splits["train"]
    ]
    assert all(of_images.is_file(f"train/{each.name}") for each in manifest.splits["train"])
    with pytest.raises(UserError, match=r"statistics alone, for latents\.online=true stores no latents"):
        require_stored(online, manifest)
    assert main(["data", "verify", online.url()]) == 2
    assert "latents.online=true stores no latents" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"these latents are stored, so set latents\.online=false"):
        import_latents(runs[1].config, of_images, runs[1].output("precompute_latents"), "public")
    with pytest.raises(UserError, match=r"latents of latents\.online=True .*, but False is configured; run precompute"):
        read_latents_of(online, manifest.tokenizer, manifest.shape)


def test_micro_batches_are_those_of_stored_latents(runs: tuple[Run, Run]) -> None:
    """As close as float16, for in extraction others share a batch; in the last step there are no features."""
    stored, online = (latents_of(run) for run in runs)
    for key in (MicroBatchKey(lane, number) for number in range(STEPS) for lane in range(LANES)):
        theirs, images = stored.stream[key], online.stream[key]
        assert isinstance(theirs, LatentMicroBatch)
        assert isinstance(images, ImageMicroBatch)
        assert online.encoder is not None
        ours = online.encoder.encode(images)
        assert ours.labels.equal(theirs.labels)
        for name in ("mean", "std"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=2e-3, atol=2e-4)
        assert (ours.features is None) == (theirs.features is None) == (key.step == 2)
        if ours.features is not None:
            torch.testing.assert_close(ours.features, theirs.features, rtol=2e-2, atol=2e-2)


def trained(run: Run, *sessions: LocalSession) -> tuple[list[Mapping[str, Any]], Mapping[str, Tensor]]:
    """Rows of the log, and weights of the export."""
    for session in sessions:
        train(begin_training(run, "train_lightningdit", World()), session, World())
    model: nn.Module = load_exported_lightningdit(run.folder("train_lightningdit"))[0]
    return [*read_rows(run.training_folder("train_lightningdit").child("log"))], model.state_dict()


def test_a_training_learns_as_from_stored_latents_and_goes_on_to_the_same_bits(
    runs: tuple[Run, Run], tmp_path: Path
) -> None:
    stored, online = runs
    shutil.copytree(online.storage.url(), tmp_path / online.config.name)
    place = online.config.storage.model_copy(update={"root": str(tmp_path)})
    theirs, _ = trained(stored, LocalSession())
    rows, weights = trained(online, LocalSession())
    _, resumed = trained(Run(online.config.model_copy(update={"storage": place})), ImpatientSession(), LocalSession())
    assert len(rows) == STEPS
    for ours, other in zip(rows, theirs, strict=True):
        for name in ("loss/total", "gradient_norm/lightningdit"):
            assert ours[name] == pytest.approx(other[name], rel=1e-2)
        assert ("loss/representation" in ours) == ("loss/representation" in other)
    assert all(tensor.equal(resumed[name]) for name, tensor in weights.items())
    in_process.sample(online)
    assert online.artifact("sample") is not None


def test_the_plan_counts_the_encoder_and_no_space(runs: tuple[Run, Run]) -> None:
    stored, online = (run.config for run in runs)
    assert latent_bytes(online) == feature_bytes(online) == bytes_to_write(online, "precompute_latents", None) == 0
    flops = [
        training_flops(config, "train_lightningdit", seen) for config in (online, stored) for seen in (0, 2 * BATCH)
    ]
    encoding = encoding_flops(online)
    assert flops[0] - flops[2] == encoding + features_flops(online)
    assert flops[1] - flops[3] == encoding
    encoder = latents_of(runs[1]).encoder
    assert encoder is not None
    networks = (encoder._tokenizer, encoder._teacher.model)  # type: ignore[union-attr]
    held = sum(each.numel() for network in networks for each in network.parameters())
    assert frozen_bytes(online, "train_lightningdit") == pytest.approx(4 * held, rel=0.01)
    assert frozen_bytes(stored, "train_lightningdit") == 0


def test_the_latent_space_of_latents_that_are_not_stored_is_refused(tmp_path: Path) -> None:
    config = configured(tmp_path, online=True)
    with pytest.raises(ValueError, match=r"evaluate\.latent_space measures stored latents, and latents\.online=true"):
        RunConfig.model_validate({**config.model_dump(exclude_unset=True), "evaluate": {"latent_space": {}}})
