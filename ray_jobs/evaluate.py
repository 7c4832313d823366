"""Held-out images, exports and samples → measures and report: ``python -m ray_jobs.evaluate --config FILE``."""

import sys

from ray_jobs._command import main
from ray_jobs._pool import Advance, Work, work_through
from vavae.data.manifest import read_manifest
from vavae.report.results import write_results
from vavae.training.run import Run


def work(run: Run) -> None:
    """Measure and write the report, in one actor, because the measures are sums over everything."""
    manifest = read_manifest(run.storage, run.prefix("prepare_shards"))
    images = min(run.config.evaluate.images, manifest.count("validation")) + run.config.sample.images
    work_through(run, "evaluate", _make_work, [run], images, actors=1)


def _make_work(run: Run) -> Work:
    def do(item: Run, advance: Advance) -> None:
        write_results(item, advance)

    return do


if __name__ == "__main__":
    sys.exit(main("evaluate", "Measure reconstruction, alignment and generation, and write the report.", work))
