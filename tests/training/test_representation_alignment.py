"""Training with tokens that are aligned with features: one step, and the way from images to the export."""

from pathlib import Path

import pytest
import torch
from support import in_process
from support.chain import ImpatientSession
from support.recipes import recipe_config
from support.training_steps import BATCH, build_step, tiny_config

from vavae.config.load import load
from vavae.data.image_stream import MicroBatchKey
from vavae.data.shards.manifest import Manifest, ShardInfo
from vavae.data.shards.write import write_shards
from vavae.diffusion.config import RepresentationConfig
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.interop.averages import load_weights
from vavae.interop.export import load_exported_lightningdit
from vavae.planning import jobs, training
from vavae.planning.cluster import ClusterSpec
from vavae.planning.jobs import Dataset, estimate_jobs
from vavae.planning.sizes import bytes_to_write, feature_bytes, latent_bytes, trained_parameters
from vavae.runs.config import RunConfig
from vavae.runs.run import Run
from vavae.runs.training_inputs import begin_training
from vavae.training.flops.flops import encoding_flops, features_flops, training_flops
from vavae.training.logging.log import read_rows
from vavae.training.session import LocalSession
from vavae.training.train import train

JOB = "train_lightningdit"
RECIPE = "representation alignment"
TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
TORCH = {"backend": "torch"}
ALIGNED = [
    "latents.features.teacher.name=efficientnet_lite0",
    "objective.representation={after_block: 1, projector_width: 16, stop_images: 64}",
    *(f"{job}.engine.backend=torch" for job in ("train_vavae", JOB)),
]


def micro_batches(config, number):
    return [build_step(JOB, config, World()).source()[MicroBatchKey(lane, number)] for lane in range(4)]


def with_convolution(config):
    """The configuration with iREPA's projector and features."""
    other = RepresentationConfig(after_block=2, projector="conv", spatial_norm=0.6)
    return config.model_copy(update={"objective": config.objective.model_copy(update={"representation": other})})


@pytest.mark.parametrize("change", [lambda config: config, with_convolution], ids=["mlp", "conv"])
def test_the_transformer_begins_as_without_and_its_loss_has_one_more_term(change):
    config, plain = change(recipe_config(RECIPE, engine=TORCH)), tiny_config(engine=TORCH)
    step, without = build_step(JOB, config, World()), build_step(JOB, plain, World())
    ours, theirs = step.engines["lightningdit"].weights(), without.engines["lightningdit"].weights()
    assert {key for key in ours if key not in theirs} == {key for key in ours if key.startswith("alignment.")} != set()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    batches = micro_batches(config, 0)
    found, expected = step.run(batches, 0, 1e-3).terms, without.run(batches, 0, 1e-3).terms
    assert found.keys() - expected.keys() == {"loss/representation"}
    assert found["loss/velocity"] == expected["loss/velocity"]
    difference = found["loss/total"] - expected["loss/total"]
    torch.testing.assert_close(difference, 0.5 * found["loss/representation"], rtol=1e-4, atol=1e-5)


def test_where_it_stops_no_feature_is_needed_and_the_projector_stays():
    config = recipe_config(RECIPE, engine=TORCH, optimizer={"learning_rate": 1e-3, "weight_decay": 0})
    step, stopped = (build_step(JOB, config, World()) for _ in range(2))
    before = step.engines["lightningdit"].weights()
    batches = micro_batches(config, 3)
    result = step.run(batches, 3 * BATCH, 1e-3)
    assert "loss/representation" not in result.terms
    stopped.run([batch._replace(features=None) for batch in batches], 3 * BATCH, 1e-3)
    after, without = (each.engines["lightningdit"].weights() for each in (step, stopped))
    assert all(torch.equal(after[key], without[key]) for key in after)
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved
    assert not any(key.startswith("alignment.") for key in moved)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose LightningDiT was aligned, its training broken off and resumed."""
    root = tmp_path_factory.mktemp("runs")
    budgets = ["train_vavae.images=32", f"{JOB}.images=128", f"{JOB}.checkpoint_images=32", f"{JOB}.log_images=32"]
    previews = ["train_vavae.preview_images=null", "train_vavae.probe_images=null", f"{JOB}.preview_images=128"]
    run = Run(load(RunConfig, TINY, [f"storage.root={root}", *budgets, *previews, *ALIGNED]))
    write_shards(run.storage, run.prefix("prepare_shards"), run.config.shards, in_process.ignore)
    train(begin_training(run, "train_vavae", World()), LocalSession(), World())
    in_process.precompute_latents(run)
    for session in (ImpatientSession(), LocalSession()):
        train(begin_training(run, JOB, World()), session, World())
    return run


@pytest.mark.jobs
def test_a_training_is_aligned_until_its_stop_and_exports_no_projector(run):
    rows = read_rows(run.training_folder(JOB).child("log"))
    losses = {row["images"]: row.get("loss/representation") for row in rows}
    assert all(-1 <= loss <= 1 for seen, loss in losses.items() if seen <= 64)
    assert [losses[seen] for seen in (96, 128)] == [None, None]
    assert run.plan(JOB).done
    model, _ = load_exported_lightningdit(run.stored(JOB).folder)
    weights = model.state_dict()
    assert not [name for name in weights if "projector" in name]
    average = {f"model.{name}": torch.empty_like(weight) for name, weight in weights.items()}
    load_weights(run.training_folder(JOB), 128, average, prefix="model.")
    assert all(average[f"model.{name}"].equal(weight) for name, weight in weights.items())
    exported = run.require(JOB).digest
    run.storage.delete(run.prefix(JOB).removesuffix("/export"))
    train(begin_training(run, JOB, World()), LocalSession(), World())
    assert run.require(JOB).digest == exported, "resumed to the same bits"


@pytest.mark.jobs
def test_features_that_are_missing_stop_a_training_before_it_begins(run):
    latents = run.folder("precompute_latents")
    text = latents.read_bytes("features/manifest.json")
    latents.delete("features/manifest.json")
    with pytest.raises(UserError, match="no latents yet"):
        begin_training(run, JOB, World())
    latents.write_bytes("features/manifest.json", text)
    other = run.config.model_copy(update={"objective": load(RunConfig, TINY).objective})
    with pytest.raises(UserError, match=r"objective.representation is None, but the LightningDiT in"):
        begin_training(Run(other), JOB, World())


def test_the_plan_counts_the_projector_and_states_the_bytes_of_the_features(monkeypatch):
    sizes = ["lightningdit={size: null, depth: 12, width: 64, heads: 2}", "lightningdit.classes=3"]
    plain = load(RunConfig, TINY, [*sizes, *ALIGNED, "objective.representation=null", "latents.features=null"])
    config = load(RunConfig, TINY, [*sizes, *ALIGNED, "objective.representation.after_block=8"])
    tokens, dim = 16, 112
    weights = 64 * 16 + 16 * 16 + 16 * dim
    counted, without = (trained_parameters(each, JOB)["lightningdit"] for each in (config, plain))
    assert counted - without == weights + 16 + 16 + dim
    assert training_flops(config, JOB) - training_flops(plain, JOB) == 3 * 2 * tokens * weights
    monkeypatch.setattr(jobs, "tokenizer_flops", lambda config: 1.0)  # which takes long to count
    monkeypatch.setattr(training, "activation_bytes", lambda config, job, images: 1)
    cluster, dataset = ClusterSpec("L4", 1), Dataset(1000, 100.0)
    found = {job.job: job for job in estimate_jobs(config, cluster, dataset)}
    latents, size = found["precompute_latents"], feature_bytes(config)
    assert 0 <= size - 2 * tokens * dim * 2 <= 1024
    assert latents.bytes_written == 1000 * (latent_bytes(config) + size)
    assert latents.flops == 2 * (encoding_flops(config) + features_flops(config))
    assert latents.bytes_read == 2 * 100, "the images are read for each"
    assert found[JOB].bytes_read == latent_bytes(config) + size
    shards = (ShardInfo(name="000000.tar", count=10, bytes=0, sha256=""),)
    manifest = Manifest(splits={"train": shards, "validation": shards}, classes=("a",), image_size=32, sources={})
    assert bytes_to_write(config, "precompute_latents", manifest) == 20 * latent_bytes(config) + 10 * size
