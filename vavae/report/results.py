"""The last stage of a run: measure, draw, and put everything into one report."""

import json
from collections.abc import Callable
from typing import Any

from vavae.config import digest
from vavae.data.manifest import Manifest, read_manifest
from vavae.data.passes import gather, read_images
from vavae.evaluation.generation import judge, measure_distance
from vavae.evaluation.latent_space import measure_latent_space
from vavae.evaluation.reconstruction import Reconstruction, measure_reconstruction
from vavae.interop.export import ALIGNMENT, load_alignment, load_tokenizer
from vavae.metrics.features import FeatureExtractor
from vavae.report.grid import enlargement, pair_grid, png_bytes
from vavae.report.html import Metric, render
from vavae.report.latents import latent_map_png, latent_space_metrics
from vavae.report.measures import distance_metric, judgement_metrics, reconstruction_metrics
from vavae.report.run_report import (
    LATENT_MAP,
    LOG,
    METRICS,
    RECONSTRUCTIONS,
    REPORT,
    log_rows,
    metrics_json,
    run_report,
)
from vavae.sampling.sample_shards import read_samples
from vavae.storage.artefact import commit, discard
from vavae.tokenizer.teacher import VisionFoundationTeacher
from vavae.training.run import Run

_CLASSIFIER_IMAGES = 4000


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
    pairs = pair_grid(*reconstruction.pairs, config.evaluate.pictures, scale=enlargement(config.shards.image_size))
    files = {RECONSTRUCTIONS: png_bytes(pairs)}
    run.storage.delete(LATENT_MAP)
    if config.evaluate.latent_space is not None:
        latents = run.storage.child(run.prefix("precompute_latents"))
        latent_space = measure_latent_space(latents, config.evaluate.latent_space, config.seed)
        metrics += latent_space_metrics(latent_space)
        files[LATENT_MAP] = latent_map_png(latent_space.first)
    content = metrics_json(metrics)
    files[METRICS] = (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
    for name, data in files.items():
        run.storage.write_bytes(name, data)
    files[LOG] = write_log(run)
    files[REPORT] = render(run_report(run)).encode()
    run.storage.write_bytes(REPORT, files[REPORT])
    beside = {name: len(data) for name, data in files.items()}
    commit(run.storage, prefix, run.record("evaluate", digest(content), {}, beside=beside))
    return metrics


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
