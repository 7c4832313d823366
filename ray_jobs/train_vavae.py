"""Image shards → tokenizer: ``python -m ray_jobs.train_vavae --config FILE``."""

import sys

from ray_jobs._command import main
from ray_jobs._train import fit
from vavae.report.results import write_log
from vavae.training.run import Run


def work(run: Run) -> None:
    """Train the tokenizer with the vision-foundation loss and export it."""
    fit(run, "train_vavae")
    write_log(run)


if __name__ == "__main__":
    sys.exit(main("train_vavae", "Train the VA-VAE on image shards.", work))
