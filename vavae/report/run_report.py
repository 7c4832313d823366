"""The report of one run, from what its jobs have left on storage; parts that are not there yet are left out."""

from pathlib import Path
from typing import Any, NamedTuple

from vavae.config.load import dump
from vavae.evaluation.metric import read_metrics
from vavae.evaluation.metrics import generation_protocol
from vavae.report.curves import training_curves
from vavae.report.html import Picture, Report
from vavae.report.run_facts import run_facts, run_summary
from vavae.runs.files import LATENT_MAP, RECONSTRUCTIONS, SAMPLES
from vavae.runs.run import JOBS, TRAININGS, Job, Run
from vavae.training.callbacks.callback import PREVIEWS
from vavae.training.checkpoints.metrics import CheckpointMetrics
from vavae.training.logging.log import read_rows


def run_report(run: Run) -> Report:
    """What there is of a run."""
    rows = log_rows(run)
    return Report(
        title=run.config.name,
        summary=run_summary(run.config),
        facts=run_facts(run, rows),
        metrics=read_metrics(run.storage),
        pictures=[*_pictures(run), *_previews(run)],
        curves=training_curves(rows),
        config=dump(run.config),
    )


def log_rows(run: Run) -> list[dict[str, Any]]:
    """The rows that the trainings of a run have logged so far, and what was measured of checkpoints."""
    trained = [job for job in TRAININGS if run.artifact(JOBS[job].inputs[0]) is not None]
    rows = {job: read_rows(run.storage.child(f"{run.training_prefix(job)}/log")) for job in trained}
    if "train_lightningdit" in trained:
        training = run.training_folder("train_lightningdit")
        measures = CheckpointMetrics.of(training, run.config.train_lightningdit)
        evaluated = {} if measures is None else measures.values()
        found = [{"stage": "train_lightningdit", "images": seen, **values} for seen, values in evaluated.items()]
        rows["train_lightningdit"] = sorted([*rows["train_lightningdit"], *found], key=lambda row: row["images"])
    return [row for job in trained for row in rows[job]]


class _Shown(NamedTuple):
    """A picture that a job may have left."""

    file: str
    title: str
    caption: str
    alt: str
    smooth: bool = False


def _pictures(run: Run) -> list[Picture]:
    generated = generation_protocol(run.config.sample.images, run.config)
    shown = (
        _Shown(
            SAMPLES,
            "Samples",
            f"The first of {generated}; one class a row.",
            "Grid of generated images, a class per row",
        ),
        _Shown(
            RECONSTRUCTIONS,
            "Reconstructions",
            "Held-out images above their reconstructions.",
            "Rows of held-out images, each above the row of its reconstructions",
        ),
        _Shown(
            LATENT_MAP,
            "Latent space",
            "Latent vectors of training images at one position each, mapped to the plane by t-SNE. Brighter is denser; "
            "the more even, the easier the space is to learn.",
            "Scatter plot of latent vectors in the plane, in the colour of their density",
            smooth=True,
        ),
    )
    there = [picture for picture in shown if run.storage.is_file(picture.file)]
    return [Picture(p.title, p.caption, run.storage.read_bytes(p.file), p.alt, p.smooth) for p in there]


class _Preview(NamedTuple):
    """Pictures that a training leaves on its way, until its model has made the final ones."""

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


def _previews(run: Run) -> list[Picture]:
    """The newest one of each training."""
    found = []
    for job, final, title, caption, alt in _PREVIEWS:
        if run.storage.is_file(final) or run.artifact(JOBS[job].inputs[0]) is None:
            continue
        for path in run.storage.list(f"{run.training_prefix(job)}/{PREVIEWS}")[-1:]:
            name = f"{title} after {int(Path(path).stem):,} images"
            found.append(Picture(name, caption, run.storage.read_bytes(path), alt))
    return found
