"""The files of an evaluated run: metrics, pictures, the log of both trainings, and the report that shows them."""

import io
import json

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from vavae.config import digest
from vavae.data.pixels import enlargement, pair_grid, png_bytes
from vavae.evaluation.evaluate import Evaluation
from vavae.evaluation.metric import metrics_json
from vavae.metrics.latent_space import LatentMap
from vavae.report.html import render
from vavae.report.run_report import log_rows, run_report
from vavae.runs.evaluation_inputs import ReportInputs
from vavae.runs.files import LATENT_MAP, LOG, METRICS, RECONSTRUCTIONS, REPORT
from vavae.runs.output import JobOutput

_COLORS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.15, 0.9, 256)))
"""Without its ends, one of which would be lost on a dark page and the other on a light one."""
_INCHES, _DPI = 5, 144
_AREA = 20_000
"""Area of all points of a map together, square points; few are drawn large."""


def write_evaluation(evaluation: Evaluation, inputs: ReportInputs, output: JobOutput) -> None:
    """Write metrics, pictures, log and report into the folder of a run, and commit them.

    Args:
        evaluation: result of the evaluation.
        inputs: those of the run, resolved after an earlier evaluation was discarded.
        output: place of the record.
    """
    config, storage, (originals, reconstructions) = inputs.config, inputs.storage, evaluation.pairs
    scale = enlargement(config.shards.image_size)
    files = {RECONSTRUCTIONS: png_bytes(pair_grid(originals, reconstructions, config.evaluate.pictures, scale=scale))}
    storage.delete(LATENT_MAP)
    if evaluation.latent_map is not None:
        files[LATENT_MAP] = latent_map_png(evaluation.latent_map)
    content = metrics_json(evaluation.metrics)
    files[METRICS] = (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
    for name, data in files.items():
        storage.write_bytes(name, data)
    files[LOG] = write_log(inputs)
    files[REPORT] = render(run_report(inputs)).encode()
    storage.write_bytes(REPORT, files[REPORT])
    output.commit(digest(content), {}, beside={name: len(data) for name, data in files.items()})


def write_log(inputs: ReportInputs) -> bytes:
    """Write the rows of both trainings into one file, and return its content."""
    data = "".join(json.dumps(row) + "\n" for row in log_rows(inputs)).encode()
    inputs.storage.write_bytes(LOG, data)
    return data


def latent_map_png(latent_map: LatentMap) -> bytes:
    """Draw a map of the latent space as a PNG, each point in the color of its density, the densest brightest."""
    figure = Figure(figsize=(_INCHES, _INCHES), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    axes.set_axis_off()
    order = np.argsort(latent_map.densities)  # the densest on top
    x, y = latent_map.points[order].T
    axes.scatter(x, y, _AREA / len(order), latent_map.densities[order], cmap=_COLORS, linewidths=0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return buffer.getvalue()
