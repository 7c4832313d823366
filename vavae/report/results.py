"""The last stage of a run: measure, draw, and put everything into one report."""

import json
import platform
from collections.abc import Callable
from typing import Any

import torch

from vavae.config import digest
from vavae.config.load import dump
from vavae.data.manifest import Manifest, read_manifest
from vavae.data.passes import gather, read_images
from vavae.evaluation.generation import judge, measure_distance
from vavae.evaluation.reconstruction import Reconstruction, measure_reconstruction
from vavae.interop.export import ALIGNMENT, load_alignment, load_tokenizer
from vavae.metrics.features import FeatureExtractor
from vavae.report.curves import training_curves
from vavae.report.grid import image_grid, pair_grid, png_bytes
from vavae.report.html import Metric, Picture, Report, render
from vavae.report.measures import distance_metric, generation_protocol, judgement_metrics, reconstruction_metrics
from vavae.sampling.sample_shards import read_samples
from vavae.storage.artefact import commit, discard
from vavae.tokenizer.teacher import VisionFoundationTeacher
from vavae.training.log import read_rows
from vavae.training.run import STAGES, TRAININGS, Run

METRICS, LOG, REPORT = "metrics.json", "metrics.jsonl", "report.html"
SAMPLES, RECONSTRUCTIONS = "samples.png", "reconstructions.png"

_CLASSIFIER_IMAGES = 4000
_PICTURE_CLASSES = 20
_PICTURE_PIXELS = 64
"""Images smaller than this are enlarged in pictures."""


def write_results(run: Run, advance: Callable[[int], None]) -> list[Metric]:
    """Measure a run, and write measures, pictures and report beside its artefacts.

    Args:
        run: with a tokenizer and samples.
        advance: told the images done since its last call.

    Returns:
        The measures.
    """
    config, prefix = run.config, run.prefix("evaluate")
    discard(run.storage, prefix)
    extractor = FeatureExtractor(config.evaluate.metrics.extractor)
    manifest = read_manifest(run.storage, run.prefix("prepare_shards"))
    reconstruction = _reconstruct(run, manifest, extractor, advance)
    metrics = reconstruction_metrics(reconstruction, extractor, config)
    metrics += _generation(run, manifest, reconstruction, extractor, advance)
    pairs = png_bytes(
        pair_grid(*reconstruction.pairs, config.evaluate.pictures, scale=_scale(config.shards.image_size))
    )
    content = {metric.name: _plain(metric) for metric in metrics}
    files = {
        METRICS: (json.dumps(content, indent=1, allow_nan=False) + "\n").encode(),
        RECONSTRUCTIONS: pairs,
        LOG: write_log(run),
        REPORT: render(_report(run, metrics, pairs)).encode(),
    }
    for name, data in files.items():
        run.storage.write_bytes(name, data)
    beside = {name: len(data) for name, data in files.items()}
    commit(run.storage, prefix, run.record("evaluate", digest(content), {}, beside=beside))
    return metrics


def write_samples_picture(run: Run) -> dict[str, int]:
    """Draw the first generated images of every class, a row each; name and size of the file."""
    config, storage = run.config.sample, run.storage.child(run.prefix("sample"))
    classes = len(read_manifest(run.storage, run.prefix("prepare_shards")).classes)
    wanted, images, labels = classes * config.picture_columns, [], []
    for shard in read_samples(storage, [name for name in storage.list() if name.endswith(".tar")]):
        images.append(shard.images)
        labels.append(shard.labels)
        if sum(map(len, labels)) >= wanted:
            break
    pixels, names = torch.cat(images), torch.cat(labels)
    rows = [pixels[names == label][: config.picture_columns] for label in range(min(classes, _PICTURE_CLASSES))]
    columns = min(len(row) for row in rows)
    if columns == 0:
        return {}
    grid = image_grid(torch.cat([row[:columns] for row in rows]), columns, scale=_scale(pixels.shape[-1]))
    data = png_bytes(grid)
    run.storage.write_bytes(SAMPLES, data)
    return {SAMPLES: len(data)}


def log_rows(run: Run) -> list[dict[str, Any]]:
    """The rows that the trainings of a run have logged so far."""
    trained = [job for job in TRAININGS if run.artefact(STAGES[job].inputs[0]) is not None]
    return [row for job in trained for row in read_rows(run.storage.child(f"{run.training_prefix(job)}/log"))]


def write_log(run: Run) -> bytes:
    """Put the rows of both trainings into one file; its content."""
    data = "".join(json.dumps(row) + "\n" for row in log_rows(run)).encode()
    run.storage.write_bytes(LOG, data)
    return data


def _reconstruct(
    run: Run, manifest: Manifest, extractor: FeatureExtractor, advance: Callable[[int], None]
) -> Reconstruction:
    config, export = run.config.evaluate, run.storage.child(run.prefix("train_vavae"))
    tokenizer, description = load_tokenizer(export)
    aligned = ALIGNMENT in run.require("train_vavae").files  # an imported tokenizer may never have been
    return measure_reconstruction(
        _images(run, manifest, "validation", config.images),
        tokenizer,
        load_alignment(export) if aligned else None,
        VisionFoundationTeacher(description.teacher) if aligned else None,
        extractor,
        run.config.seed,
        config.pictures,
        advance,
    )


def _generation(
    run: Run,
    manifest: Manifest,
    reconstruction: Reconstruction,
    extractor: FeatureExtractor,
    advance: Callable[[int], None],
) -> list[Metric]:
    config, storage = run.config, run.storage.child(run.prefix("sample"))
    shards = [name for name in run.require("sample").files if name.endswith(".tar")]
    count, distance = measure_distance(
        read_samples(storage, shards), reconstruction.features, extractor, config.evaluate.metrics.batch_size, advance
    )
    metrics = [distance_metric(distance, count, reconstruction.images, extractor, config)]
    if config.evaluate.class_agreement:
        train = gather(_images(run, manifest, "train", _CLASSIFIER_IMAGES))
        held_out = gather(_images(run, manifest, "validation", _CLASSIFIER_IMAGES))
        judged = judge(gather(read_samples(storage, shards)), train, held_out, config.seed)
        metrics += judgement_metrics(judged, count, train, config)
    return metrics


def _images(run: Run, manifest: Manifest, split: str, limit: int) -> Any:
    storage = run.storage.child(run.prefix("prepare_shards"))
    return read_images(storage, manifest, split, limit, run.config.evaluate.batch_size)


def _report(run: Run, metrics: list[Metric], pairs: bytes) -> Report:
    count = run.config.sample.images
    caption = f"The first of {generation_protocol(count, run.config)}; one class a row."
    return Report(
        title=run.config.name,
        facts=_facts(run),
        metrics=metrics,
        pictures=[
            Picture("Samples", caption, run.storage.read_bytes(SAMPLES), "Grid of generated images, a class per row"),
            Picture(
                "Reconstructions",
                "Held-out images above their reconstructions.",
                pairs,
                "Rows of held-out images, each above the row of its reconstructions",
            ),
        ],
        curves=training_curves(log_rows(run)),
        config=dump(run.config),
    )


def _facts(run: Run) -> dict[str, str]:
    facts = {"storage": run.storage.url(), "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for job, stage in STAGES.items():
        record = run.artefact(job)
        if record is not None:
            seen = "" if record.images_seen is None else f", {record.images_seen:,} images seen"
            facts[stage.makes] = f"{record.digest[:12]}{seen}"
    return facts


def _plain(metric: Metric) -> dict[str, Any]:
    return {"value": metric.value, "unit": metric.unit, "better": metric.better, "protocol": metric.protocol}


def _scale(size: int) -> int:
    return max(1, _PICTURE_PIXELS // size)
