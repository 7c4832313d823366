"""Held-out images, exports and samples → measures and report: ``python -m ray_jobs.evaluate --config FILE``."""

import sys

from ray_jobs.runtime.actor_pool import Advance, Work, work_through
from ray_jobs.runtime.checkpoint_evaluation import evaluate_pending_checkpoints
from ray_jobs.runtime.command import main
from vavae.evaluation.evaluator import Evaluator
from vavae.evaluation.parts import Part
from vavae.report.write_report import write_evaluation
from vavae.runs.run import Run


def work(run: Run) -> None:
    """Measure what is missing, several parts at a time where there are actors for it; then write the report."""
    evaluate_pending_checkpoints(run)
    parts, actors = Evaluator(run).missing(), run.config.evaluate.actors
    images = sum(len(part.span) for part in parts)
    if actors > 1 and len(parts) > 1:
        work_through(run, "evaluate", _make_measure, parts, images, actors)
        images = 0
    work_through(run, "evaluate", _make_report, [run], images, actors=1)


def _make_measure(run: Run) -> Work:
    measuring = Evaluator(run)

    def do(part: Part, advance: Advance) -> None:
        measuring.measure(part, advance)

    return do


def _make_report(run: Run) -> Work:
    def do(item: Run, advance: Advance) -> None:
        write_evaluation(item, advance)

    return do


if __name__ == "__main__":
    sys.exit(main("evaluate", "Measure reconstruction, alignment and generation, and write the report.", work))
