"""The files of an evaluated run: metrics, pictures, the log of both trainings, and the report that shows them."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vavae.config import digest
from vavae.data.image import png_bytes
from vavae.data.pixels import enlargement, pair_grid
from vavae.data.shards.manifest import read_manifest
from vavae.evaluation.convergence import convergence_metrics
from vavae.evaluation.evaluate import Evaluation
from vavae.evaluation.metric import Metric, metrics_json
from vavae.report.figures import latent_map_png
from vavae.report.html import render
from vavae.report.run_report import log_rows, run_report
from vavae.runs.evaluation_inputs import ReportInputs
from vavae.runs.files import LATENT_MAP, LOG, METRICS, RECONSTRUCTIONS, REPORT, SAMPLES
from vavae.runs.output import JobOutput
from vavae.tracking.trackers import track
from vavae.training.checkpoints.metrics import CheckpointMetrics
from vavae.training.logging.log import rows_text


def write_evaluation(evaluation: Evaluation, inputs: ReportInputs, output: JobOutput) -> None:
    """Write metrics, pictures, log and report into the folder of a run, and commit them.

    Args:
        evaluation: result of the evaluation.
        inputs: those of the run, resolved after an earlier evaluation was discarded.
        output: place of the record.
    """
    config, storage, (originals, reconstructions) = inputs.config, inputs.storage, evaluation.pairs
    scale = enlargement(config.shards.height_and_width)
    files = {RECONSTRUCTIONS: png_bytes(pair_grid(originals, reconstructions, config.evaluate.pictures, scale=scale))}
    storage.delete(LATENT_MAP)
    if evaluation.latent_map is not None:
        files[LATENT_MAP] = latent_map_png(evaluation.latent_map)
    content = metrics_json([*evaluation.metrics, *_convergence(inputs)])
    files[METRICS] = (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
    for name, data in files.items():
        storage.write_bytes(name, data)
    _track(inputs, content)
    files[LOG] = write_log(inputs)
    files[REPORT] = render(run_report(inputs)).encode()
    storage.write_bytes(REPORT, files[REPORT])
    output.commit(digest(content), {}, beside={name: len(data) for name, data in files.items()})


def _track(inputs: ReportInputs, content: Mapping[str, Mapping[str, Any]]) -> None:
    """Show metrics and pictures in the trackers of the run; TensorBoard is for trainings."""
    names = [name for name in inputs.config.tracking if name != "tensorboard"]
    if not names:
        return
    pictures = {}
    for file in (SAMPLES, RECONSTRUCTIONS, LATENT_MAP):
        if inputs.storage.is_file(file):
            with Image.open(io.BytesIO(inputs.storage.read_bytes(file))) as picture:
                pictures[Path(file).stem] = picture.convert("RGB")
    metrics = {name: metric["value"] for name, metric in content.items()}
    model = inputs.artifacts.get("train_lightningdit")
    track(names, inputs.tracked, (model and model.images_seen) or 0, metrics, pictures)


def _convergence(inputs: ReportInputs) -> list[Metric]:
    """Metrics of the images until measured checkpoints of a run reach the Fréchet distances that it names."""
    thresholds, training = inputs.config.evaluate.frechet_thresholds, inputs.trainings.get("train_lightningdit")
    if not thresholds or training is None:
        return []
    checkpoints = CheckpointMetrics.of(training, inputs.config.train_lightningdit)
    assert checkpoints is not None, "thresholds are those of measured checkpoints"
    return convergence_metrics(checkpoints.found(), thresholds, read_manifest(inputs.shards).count("train"))


def write_log(inputs: ReportInputs) -> bytes:
    """Write the rows of both trainings into one file, and return its content."""
    data = rows_text(log_rows(inputs)).encode()
    inputs.storage.write_bytes(LOG, data)
    return data
