"""From digits to the report in this process, without Ray: every job reads what the one before has left on storage."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import in_process
from support.chain import whole_chain
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vavae.data.shards.manifest import read_manifest
from vavae.data.shards.write import write_shards
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.evaluation import evaluator as evaluator_module
from vavae.evaluation import parts
from vavae.evaluation.checkpoints import evaluate_checkpoint, evaluate_pending_checkpoints
from vavae.evaluation.config import EvaluateConfig
from vavae.evaluation.evaluator import Evaluator
from vavae.evaluation.generation import Reference, evaluate_generation
from vavae.evaluation.parts import Part
from vavae.metrics.config import LATENT_PROBES, MetricsConfig
from vavae.report.run_report import log_rows
from vavae.runs.evaluation_inputs import CheckpointEvaluationInputs, EvaluationInputs, ReportInputs
from vavae.runs.jobs import JOBS
from vavae.runs.run import Run
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.runs.training_inputs import begin_training
from vavae.training.checkpoints.metrics import EVALUATIONS, CheckpointMetrics
from vavae.training.checkpoints.snapshots import find_snapshots
from vavae.training.logging.metric_names import METRICS
from vavae.training.session import LocalSession
from vavae.training.train import train

pytestmark = pytest.mark.jobs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    # In one shard, for a batch of samples ends with its shard, and that of a checkpoint does not: sums round otherwise.
    # The first attempts stop between two rows.
    rows = ("train_vavae.log_images=48", "train_lightningdit.log_images=96")
    averages = (
        "train_lightningdit.averages=[{name: narrow, std: 0.05}, {name: wide, std: 0.2}]",
        "train_lightningdit.average_snapshot_images=128",
    )
    return whole_chain(tmp_path_factory.mktemp("runs"), "sample.shard_images=40", *rows, *averages)


def _log(run: Run) -> list[Mapping[str, float | str]]:
    return [json.loads(line) for line in run.storage.read_bytes("metrics.jsonl").decode().splitlines()]


def test_every_job_is_done(run: Run) -> None:
    plans = run.plans()
    assert plans.keys() == JOBS.keys()
    assert [job for job, plan in plans.items() if not plan.done] == []


def test_measures_are_numbers_with_a_protocol(run: Run) -> None:
    metrics = json.loads(run.storage.read_bytes("metrics.json"))
    assert metrics.keys() >= {
        "psnr",
        "ssim",
        "reconstruction_frechet_distance",
        "alignment_cosine",
        "generation_frechet_distance",
        "class_agreement",
        "density_cv",
        "density_gini",
        "density_entropy",
    }
    for metric in metrics.values():
        assert math.isfinite(metric["value"])
        assert metric["protocol"]
        assert metric["better"] in ("higher", "lower")


def test_a_checkpoint_is_measured_as_the_export_is(run: Run) -> None:
    measures = CheckpointMetrics.of(run.training_folder("train_lightningdit"), run.config.train_lightningdit)
    assert measures is not None
    assert measures.waiting() == [128, 256]
    evaluate_pending_checkpoints(CheckpointEvaluationInputs.of(run))
    found, metrics = measures.found(), json.loads(run.storage.read_bytes("metrics.json"))
    of_generation = {name for name in metrics if name.startswith("generation_")}
    assert of_generation >= {"generation_frechet_distance", "generation_precision"}
    assert found[256].keys() == of_generation
    assert found[256] == {name: metrics[name] for name in found[256]}
    assert found[128]["generation_frechet_distance"]["value"] != found[256]["generation_frechet_distance"]["value"]
    folder = run.storage.child(run.training_prefix("train_lightningdit"))
    assert len(folder.list("checkpoints")) == run.config.train_lightningdit.keep_checkpoints
    rows = log_rows(ReportInputs.of(run))
    assert [row["images"] for row in rows if "generation_frechet_distance" in row] == [128, 256]
    shown = EventAccumulator(run.storage.url("tensorboard/train_lightningdit_measured")).Reload()
    scalars = {scalar.step: scalar.value for scalar in shown.Scalars("generation_frechet_distance")}
    assert scalars == {seen: pytest.approx(found[seen]["generation_frechet_distance"]["value"]) for seen in (128, 256)}


def test_further_averages_are_exported_sampled_and_evaluated(run: Run) -> None:
    training = run.training_folder("train_lightningdit")
    assert find_snapshots(training) == [128, 256]
    digests = {name: run.require_average(name).digest for name in ("narrow", "wide")}
    assert len({*digests.values(), run.require("train_lightningdit").digest}) == 3
    section, weights = run.config.train_lightningdit, {"weights": "wide"}
    assert section.measure is not None
    section = section.model_copy(update={"measure": section.measure.model_copy(update=weights)})
    samples = run.config.sample.model_copy(update=weights)
    wide = Run(run.config.model_copy(update={"sample": samples, "train_lightningdit": section}))
    assert wide.plans(sources=False)["sample"].why == "made with another configuration"
    assert SamplingInputs.of(wide).lightningdit.digest == digests["wide"]
    path = f"{EVALUATIONS}/{256:012d}.json"
    evaluate_checkpoint(CheckpointEvaluationInputs.of(run), 256)
    of_export = training.read_bytes(path)
    evaluate_checkpoint(CheckpointEvaluationInputs.of(wide), 256)
    ours, theirs = json.loads(training.read_bytes(path)), json.loads(of_export)
    training.write_bytes(path, of_export)
    name = "generation_frechet_distance"
    assert ours[name]["value"] != theirs[name]["value"]
    assert "40 class-balanced samples, average wide, " in ours[name]["protocol"]
    assert "average" not in theirs[name]["protocol"]


def test_what_was_seen_of_the_tokenizer_serves_the_next_samples(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator_module, "evaluate_latent_space", in_process.ignore)  # which would not do
    again = _evaluator(run)
    assert {part.set_name for part in again.missing()} == {"samples"}
    kept = [path.partition("-")[0] for path in run.storage.list("measuring")]
    assert kept == ["measuring/latents", "measuring/reconstructions"], "and nothing else is left"
    metrics, found = json.loads(run.storage.read_bytes("metrics.json")), again.latent_space()
    assert found is not None
    assert found.mean.cv == metrics["density_cv"]["value"]
    assert again.reconstruction().means["psnr"] == metrics["psnr"]["value"]


def test_further_metrics_of_a_finished_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate_pending_checkpoints(CheckpointEvaluationInputs.of(run))
    shutil.copytree(run.storage.url(), tmp_path / "again")
    measured = CheckpointMetrics.of(run.training_folder("train_lightningdit"), run.config.train_lightningdit)
    assert measured is not None
    first, last = (measured.values()[seen]["generation_frechet_distance"] for seen in (128, 256))
    between, never = (first * last) ** 0.5, last / 2
    asked = {
        "class_agreement": "efficientnet_lite0",
        "frechet_ratio": {},
        "frechet_thresholds": [between, never],
        "mind": {"directions": 50},
        "latent_probes": {"images_per_class": 4},
    }
    evaluate = EvaluateConfig.model_validate({**run.config.evaluate.model_dump(), **asked})
    storage = run.config.storage.model_copy(update={"root": str(tmp_path)})
    again = Run(run.config.model_copy(update={"name": "again", "storage": storage, "evaluate": evaluate}))
    monkeypatch.setattr(evaluator_module, "CLASSIFIER_IMAGES", 300)
    in_process.evaluate_and_report(again)
    before, after = (json.loads(each.storage.read_bytes("metrics.json")) for each in (run, again))
    # The probe and the classifier of pixels are of other images than these: only what both have is equal.
    assert all(after[name] == metric for name, metric in before.items() if not name.startswith("class_agreement"))
    probe = after["class_agreement_of_real_images"]
    assert 0.8 < probe["value"] <= 1
    assert probe["protocol"].startswith(
        "custom: 64 held-out images; linear probe (logistic regression, C = 0.01) on standardized features of 300 "
    )
    ratio, alone = (after[f"generation_frechet_ratio{suffix}"] for suffix in ("", "_efficientnet_lite0"))
    assert ratio["value"] == alone["value"] > 1
    assert "that of 40 training images" in alone["protocol"]
    if last < first:
        images = after[f"images_to_frechet/{between:g}"]
        assert images["value"] == pytest.approx(192), "the middle, for the threshold is the geometric mean"
    report = again.storage.read_bytes("report.html").decode()
    assert LATENT_PROBES.keys() == {name for name in after if name.startswith(("latent_", "equivariance_"))}
    assert all(name in report for name in LATENT_PROBES)
    assert 0 < after["latent_velocity_variance"]["value"] < math.pi / 2
    assert f"images_to_frechet/{never:g}" in report
    assert "not reached in 256 images; lowest" in report
    assert again.plan("evaluate").done


def _evaluator(run: Run) -> Evaluator:
    return Evaluator(EvaluationInputs.of(run))


def _forget(run: Run) -> None:
    """Drop all that was seen of images."""
    for folder in ("references", "measuring"):
        run.storage.delete(folder)


def _figures(run: Run, order: Sequence[Part]) -> dict[str, float]:
    """All figures of a run whose parts are measured in this order, by two processes in turns."""
    _forget(run)
    actors = [_evaluator(run), _evaluator(run)]
    for number, part in enumerate(order):
        actors[number % 2].evaluate(part, in_process.ignore)
    last = _evaluator(run)
    assert last.missing() == []
    reconstruction, name = last.reconstruction(), run.config.evaluate.metrics.extractor
    generation = evaluate_generation(last.generated()[name], last.references()[name], run.config.seed)
    last.clean()
    assert generation.kernel_distance is not None
    assert generation.precision_recall is not None
    return {
        **reconstruction.means,
        "reconstruction_frechet_distance": reconstruction.frechet_distances[name],
        "generation_frechet_distance": generation.frechet_distance,
        "generation_kernel_distance": generation.kernel_distance.mean,
        **generation.precision_recall._asdict(),
    }


def test_figures_hang_on_neither_actors_nor_batches(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SPLIT_IMAGES", 18)  # in the middle of a shard of samples
    metrics = json.loads(run.storage.read_bytes("metrics.json"))
    _forget(run)
    missing = _evaluator(run).missing()
    assert [part.set_name for part in missing] == ["held_out"] * 4 + ["reconstructions"] * 4 + ["samples"] * 3
    found = _figures(run, missing)
    assert _figures(run, missing[::-1]) == found, "bitwise identical"
    small = run.config.evaluate.model_copy(update={"batch_size": 7, "metrics": MetricsConfig(batch_size=5)})
    other = _figures(Run(run.config.model_copy(update={"evaluate": small})), missing)
    for name, value in found.items():
        assert other[name] == pytest.approx(value, rel=1e-4), name
        if name in metrics:  # of one part
            assert metrics[name]["value"] == pytest.approx(value, rel=1e-6), name


def _reference(run: Run, reference: str) -> Reference:
    evaluate = run.config.evaluate.model_copy(update={"reference": reference})
    evaluator = _evaluator(Run(run.config.model_copy(update={"evaluate": evaluate})))
    for part in evaluator.missing():
        if part.set_name not in ("reconstructions", "samples"):
            evaluator.evaluate(part, in_process.ignore)
    assert {part.set_name for part in evaluator.missing()} <= {"reconstructions", "samples"}
    return evaluator.references()[run.config.evaluate.metrics.extractor]


def test_generated_images_are_compared_with_what_the_configuration_names(run: Run, tmp_path: Path) -> None:
    held_out, train = _reference(run, "validation"), _reference(run, "train")
    assert held_out.name == f"{run.config.evaluate.images} held-out images"
    assert train.images == read_manifest(run.storage, run.prefix("prepare_shards")).count("train")
    assert train.name == f"{train.images:,} training images"
    images = _evaluator(run).first_images("validation", 20).images.permute(0, 2, 3, 1)
    moments = {"mu": held_out.pooled.mean, "sigma": held_out.pooled.covariance}
    np.savez(tmp_path / "adm.npz", arr_0=images.numpy(), **{name: array.numpy() for name, array in moments.items()})
    file = _reference(run, str(tmp_path / "adm.npz"))
    assert torch.equal(file.pooled.covariance, held_out.pooled.covariance)
    torch.testing.assert_close(file.kept, held_out.kept[:20], rtol=1e-4, atol=1e-4)
    assert file.name == "adm.npz"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "gone.npz"}, r"evaluate.reference=gone.npz: no file there; ADM's .* is https://"),
        ({"reconstruction_protocol": "rfid-val-50k"}, r"means 50,000 held-out images, .* has 262: set it to custom"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(run: Run, change: dict[str, str], message: str) -> None:
    evaluate = run.config.evaluate.model_copy(update=change)
    with pytest.raises(UserError, match=message):
        _evaluator(Run(run.config.model_copy(update={"evaluate": evaluate})))


def test_the_log_has_every_interval_of_both_trainings_once(run: Run) -> None:
    images = {
        job: [row["images"] for row in _log(run) if row["stage"] == job]
        for job in ("train_vavae", "train_lightningdit")
    }
    # Where the first attempt stopped, at each interval, with the tokenizer's latents, with a measure, and the last.
    assert images == {"train_vavae": [32, 48, 64, 96, 128], "train_lightningdit": [64, 96, 128, 192, 256]}


def test_the_log_has_every_loss(run: Run) -> None:
    tokenizer = [row for row in _log(run) if row["stage"] == "train_vavae"]
    diffusion = [row for row in _log(run) if row["stage"] == "train_lightningdit"]
    common = {"learning_rate", "images_per_second", "data_wait", "forward", "backward", "optimizer", "loss/total"}
    common.add("flops_per_second")
    assert tokenizer[0].keys() >= common | {"loss/reconstruction", "loss/kl", "adaptive_weight/vf", "alignment"}
    assert tokenizer[-1].keys() >= {"loss/discriminator", "gradient_norm/discriminator", "adaptive_weight/adversarial"}
    assert 0 <= tokenizer[-1]["discriminator_accuracy"] <= 1
    assert all(row["output_variance"] > 0 for row in tokenizer + diffusion)
    assert "loss/discriminator" not in tokenizer[0], "the adversary joins later"
    assert diffusion[-1].keys() >= common | {"loss/velocity", "loss/direction", "gradient_norm/lightningdit"}
    assert any(name.startswith("loss_at_timestep/") for name in diffusion[-1])
    assert [row["images"] for row in tokenizer if "latent/effective_rank" in row] == [64, 128]
    assert all(math.isfinite(row[name]) for row in tokenizer for name in row if name.startswith("latent/"))
    assert tokenizer[-1]["loss/reconstruction"] < tokenizer[0]["loss/reconstruction"]
    assert {name for row in _log(run) for name in row} <= METRICS.keys() | {"stage", "images"}


def test_pictures_report_and_tensorboard_are_there(run: Run) -> None:
    for name in ("samples.png", "reconstructions.png", "latent_map.png"):
        with Image.open(run.storage.local_file(name)) as picture:
            assert min(picture.size) >= run.config.shards.image_size
    report = run.storage.read_bytes("report.html").decode()
    assert "generation_frechet_distance" in report or "Fréchet" in report
    for job in ("train_vavae", "train_lightningdit"):
        assert any("tfevents" in name for name in run.storage.list(f"tensorboard/{job}"))


def test_previews_are_in_the_folder_and_in_tensorboard(run: Run) -> None:
    for job, name, positions in (
        ("train_vavae", "reconstructions", [64, 128]),
        ("train_lightningdit", "samples", [256]),
    ):
        previews = run.storage.list(f"{run.training_prefix(job)}/previews")  # type: ignore[arg-type]
        assert [path.rpartition("/")[2] for path in previews] == [f"{seen:012d}.png" for seen in positions]
        events = EventAccumulator(run.storage.url(f"tensorboard/{job}"))
        events.Reload()
        assert [event.step for event in events.Images(name)] == positions


def test_a_longer_budget_meets_the_adversary_where_the_shorter_one_did_not(run: Run, tmp_path: Path) -> None:
    """The discriminator is part of the state before it starts. Looking at latents on the way changes nothing."""
    config = run.config.model_copy(update={"storage": run.config.storage.model_copy(update={"root": str(tmp_path)})})
    start = config.losses.adversarial.start_images
    assert start > 0
    for images in (start, config.train_vavae.images):
        budget = config.train_vavae.model_copy(update={"images": images, "probe_images": None, "preview_images": None})
        extended = Run(config.model_copy(update={"train_vavae": budget}))
        if images == start:
            write_shards(extended.storage, extended.prefix("prepare_shards"), config.shards, in_process.ignore)
        train(begin_training(extended, "train_vavae", World()), LocalSession(), World())
        assert extended.require("train_vavae").images_seen == images
    assert extended.require("train_vavae").digest == run.require("train_vavae").digest
