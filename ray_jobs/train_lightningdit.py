"""Latent shards → LightningDiT: ``python -m ray_jobs.train_lightningdit --config FILE``."""

import sys

from ray_jobs.runtime.checkpoint_evaluation import evaluate_checkpoints_beside
from ray_jobs.runtime.command import main
from ray_jobs.runtime.trainer import fit
from vavae.report.write_report import write_log
from vavae.runs.evaluation_inputs import ReportInputs
from vavae.runs.run import Run


def work(run: Run) -> None:
    """Train the LightningDiT on latents and export it."""
    with evaluate_checkpoints_beside(run):
        fit(run, "train_lightningdit")
    write_log(ReportInputs.of(run))


if __name__ == "__main__":
    sys.exit(main("train_lightningdit", "Train the LightningDiT on latent shards.", work))
