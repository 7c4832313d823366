"""The report of one run, from what its jobs have left on storage; parts that do not exist yet are left out."""

from pathlib import Path
from typing import Any, NamedTuple

from vavae.config.load import dump
from vavae.evaluation.metric import read_metrics
from vavae.evaluation.metrics import generation_protocol
from vavae.report.figures import Picture, training_curves
from vavae.report.html import Report
from vavae.report.run_facts import run_byline, run_facts, run_summary
from vavae.runs.evaluation_inputs import ReportInputs
from vavae.runs.files import LATENT_MAP, RECONSTRUCTIONS, SAMPLES
from vavae.runs.jobs import Job
from vavae.sampling.files import PICTURE_ROWS
from vavae.training.callbacks.callback import PREVIEWS
from vavae.training.checkpoints.metrics import CheckpointMetrics
from vavae.training.logging.log import read_rows


def run_report(inputs: ReportInputs) -> Report:
    """Gather the report of a run, finished or not."""
    rows = log_rows(inputs)
    pictures = [
        Picture(shown.title, shown.caption, inputs.storage.read_bytes(shown.file), shown.alt, shown.smooth)
        for shown in shown_pictures(inputs)
    ]
    return Report(
        title=inputs.config.name,
        summary=run_summary(inputs.config),
        byline=run_byline(inputs.storage),
        facts=run_facts(inputs, rows),
        metrics=read_metrics(inputs.storage),
        pictures=[*pictures, *_previews(inputs)],
        curves=training_curves(rows),
        config=dump(inputs.config),
    )


def log_rows(inputs: ReportInputs) -> list[dict[str, Any]]:
    """The rows that the trainings of a run have logged so far, with the metrics of evaluated checkpoints among them."""
    rows = {job: read_rows(training.child("log")) for job, training in inputs.trainings.items()}
    job: Job = "train_lightningdit"
    if job in rows:
        checkpoints = CheckpointMetrics.of(inputs.trainings[job], inputs.config.train_lightningdit)
        if checkpoints is not None:
            found = [{"stage": job, "images": seen, **values} for seen, values in checkpoints.values().items()]
            rows[job] = sorted([*rows[job], *found], key=lambda row: row["images"])
    return [row for of_training in rows.values() for row in of_training]


class ShownPicture(NamedTuple):
    """A picture that a job may have left."""

    file: str
    title: str
    caption: str
    alt: str
    smooth: bool = False


def shown_pictures(inputs: ReportInputs) -> list[ShownPicture]:
    """Pictures that the jobs of a run have left in its folder, in the order of its report."""
    generated = generation_protocol(inputs.config.sample.images, inputs.config, inputs.classes)
    rows, grid = ("; one class a row", ", a class per row") if inputs.classes != 0 else ("", "")
    if inputs.classes is not None and inputs.classes > PICTURE_ROWS:
        rows, grid = f"; one image a class, or one class a row where at most {PICTURE_ROWS} are sampled", ""
    shown = (
        ShownPicture(
            SAMPLES,
            "Samples",
            f"The first of {generated}{rows}.",
            f"Grid of generated images{grid}",
        ),
        ShownPicture(
            RECONSTRUCTIONS,
            "Reconstructions",
            "Held-out images above their reconstructions.",
            "Rows of held-out images, each above the row of its reconstructions",
        ),
        ShownPicture(
            LATENT_MAP,
            "Latent space",
            "Latent vectors of training images at one position each, mapped to the plane by t-SNE. Brighter is denser; "
            "the more even, the easier the space is to learn.",
            "Scatter plot of latent vectors in the plane, in the color of their density",
            smooth=True,
        ),
    )
    return [picture for picture in shown if inputs.storage.is_file(picture.file)]


class _Preview(NamedTuple):
    """Pictures that a training leaves at intervals, shown until its model has made the final ones."""

    job: Job
    final: str
    title: str
    caption: str
    alt: str


_PREVIEWS = (
    _Preview(
        "train_lightningdit",
        SAMPLES,
        "Samples",
        "The first images that the sample job would make with the weights at that time.",
        "Grid of generated images",
    ),
    _Preview(
        "train_vavae",
        RECONSTRUCTIONS,
        "Reconstructions",
        "Held-out images, their reconstructions, and four times the difference.",
        "Rows of held-out images, of their reconstructions, and of the differences",
    ),
)


def _previews(inputs: ReportInputs) -> list[Picture]:
    """The newest preview of each training."""
    found = []
    for job, final, title, caption, alt in _PREVIEWS:
        if job not in inputs.trainings or inputs.storage.is_file(final):
            continue
        previews = inputs.trainings[job].child(PREVIEWS)
        for path in previews.list()[-1:]:
            name = f"{title} after {int(Path(path).stem):,} images"
            found.append(Picture(name, caption, previews.read_bytes(path), alt))
    return found
