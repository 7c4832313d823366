"""The last stage of a run: measure, draw, and put everything into one report."""

import json
import logging
from collections.abc import Callable

from vavae.config import digest
from vavae.data.grid import enlargement, pair_grid, png_bytes
from vavae.evaluation.evaluator import Evaluator
from vavae.evaluation.generation import judge
from vavae.evaluation.metric import Metric, metrics_json
from vavae.evaluation.metrics import (
    classifier_metrics,
    few_images,
    generation_metrics,
    latent_space_metrics,
    reconstruction_metrics,
)
from vavae.evaluation.reconstruction import Reconstruction
from vavae.metrics.features import describe
from vavae.report.html import render
from vavae.report.latent_map import latent_map_png
from vavae.report.run_report import log_rows, run_report
from vavae.runs.files import LATENT_MAP, LOG, METRICS, RECONSTRUCTIONS, REPORT
from vavae.runs.run import Run
from vavae.storage.artifact import commit, discard

_log = logging.getLogger(__name__)

_CLASSIFIER_IMAGES = 4000


def write_evaluation(run: Run, advance: Callable[[int], None]) -> list[Metric]:
    """Measure a run, and write measures, pictures and report beside its artifacts.

    Args:
        run: with a tokenizer and samples; parts of them that have been measured already are not measured again.
        advance: told the images done since its last call.

    Returns:
        The measures.
    """
    config, prefix = run.config, run.prefix("evaluate")
    discard(run.storage, prefix)
    measuring = Evaluator(run)
    for part in measuring.missing():
        measuring.measure(part, advance)
    reconstruction = measuring.reconstruction()
    _warn_of_few(run, reconstruction)
    metrics = reconstruction_metrics(reconstruction, config) + _generation(run, measuring)
    pairs = pair_grid(*reconstruction.pairs, config.evaluate.pictures, scale=enlargement(config.shards.image_size))
    files = {RECONSTRUCTIONS: png_bytes(pairs)}
    run.storage.delete(LATENT_MAP)
    latent_space = measuring.latent_space()
    if latent_space is not None:
        metrics += latent_space_metrics(latent_space)
        files[LATENT_MAP] = latent_map_png(latent_space.maps[0])
    content = metrics_json(metrics)
    files[METRICS] = (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
    for name, data in files.items():
        run.storage.write_bytes(name, data)
    files[LOG] = write_log(run)
    files[REPORT] = render(run_report(run)).encode()
    run.storage.write_bytes(REPORT, files[REPORT])
    beside = {name: len(data) for name, data in files.items()}
    commit(run.storage, prefix, run.record("evaluate", digest(content), {}, beside=beside))
    measuring.clean()
    return metrics


def measure_tokenizer(run: Run, advance: Callable[[int], None]) -> list[Metric]:
    """The measures of a run's tokenizer alone, which needs neither latents nor samples."""
    measuring = Evaluator(run)
    for part in measuring.missing(("held_out", "reconstructions")):
        measuring.measure(part, advance)
    return reconstruction_metrics(measuring.reconstruction(), run.config)


def write_log(run: Run) -> bytes:
    """Put the rows of both trainings into one file; its content."""
    data = "".join(json.dumps(row) + "\n" for row in log_rows(run)).encode()
    run.storage.write_bytes(LOG, data)
    return data


def _generation(run: Run, measuring: Evaluator) -> list[Metric]:
    config, generated = run.config, measuring.generated()
    metrics = generation_metrics(generated, measuring.references(), config, measuring.device)
    if config.evaluate.class_agreement:
        train, held_out = (measuring.some(split, _CLASSIFIER_IMAGES) for split in ("train", "validation"))
        judged = judge(measuring.samples(), train, held_out, config.seed)
        metrics += classifier_metrics(judged, config.sample.images, held_out, train, config)
    return metrics


def _warn_of_few(run: Run, reconstruction: Reconstruction) -> None:
    """Say it where figures will not compare with those of other numbers of images."""
    config = run.config
    for name in config.evaluate.metrics.extractors:
        few = few_images(describe(name, config.evaluate.metrics), min(reconstruction.images, config.sample.images))
        if few is not None:
            _log.warning(
                "Fréchet distances through %s are biased upwards, for their covariances are singular: %s", name, few
            )
