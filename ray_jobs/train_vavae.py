"""Image shards → tokenizer: ``python -m ray_jobs.train_vavae --config FILE``."""

import sys

from ray_jobs.runtime.command import main
from ray_jobs.runtime.trainer import fit
from vavae.report.write_report import write_log
from vavae.runs.evaluation_inputs import ReportInputs
from vavae.runs.run import Run


def work(run: Run) -> None:
    """Train the tokenizer with the vision-foundation loss and export it."""
    fit(run, "train_vavae")
    write_log(ReportInputs.of(run))


if __name__ == "__main__":
    sys.exit(main("train_vavae", "Train the VA-VAE on image shards.", work))
