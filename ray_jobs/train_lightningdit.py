"""Latent shards → LightningDiT: ``python -m ray_jobs.train_lightningdit --config FILE``."""

import sys

from ray_jobs._command import main
from ray_jobs._measured import measured
from ray_jobs._train import fit
from vavae.report.results import write_log
from vavae.training.run import Run


def work(run: Run) -> None:
    """Train the LightningDiT on latents and export it."""
    with measured(run):
        fit(run, "train_lightningdit")
    write_log(run)


if __name__ == "__main__":
    sys.exit(main("train_lightningdit", "Train the LightningDiT on latent shards.", work))
