"""Held-out images, exports and samples → metrics and report: ``python -m ray_jobs.evaluate --config FILE``."""

import sys
from functools import partial

from ray_jobs.runtime.actor_pool import Advance, Work, work_through
from ray_jobs.runtime.checkpoint_evaluation import evaluate_pending_checkpoints
from ray_jobs.runtime.command import main
from vavae.evaluation.evaluate import evaluate
from vavae.evaluation.evaluator import Evaluator
from vavae.report.write_report import write_evaluation
from vavae.runs.evaluation_inputs import EvaluationInputs, ReportInputs
from vavae.runs.output import JobOutput
from vavae.runs.run import Run


def work(run: Run) -> None:
    """Evaluate what is missing, several parts at a time where there are actors for it; then write the report."""
    evaluate_pending_checkpoints(run)
    inputs, output, actors = EvaluationInputs.of(run), run.output("evaluate"), run.config.evaluate.actors
    parts = Evaluator(inputs).missing()
    images = sum(len(part.span) for part in parts)
    if actors > 1 and len(parts) > 1:
        work_through(run, "evaluate", lambda: Evaluator(inputs).evaluate, parts, images, actors)
        images = 0
    output.discard()
    report = ReportInputs.of(run)
    work_through(run, "evaluate", partial(_make_report, inputs, output), [report], images, actors=1)


def _make_report(inputs: EvaluationInputs, output: JobOutput) -> Work[ReportInputs, None]:
    evaluator = Evaluator(inputs)

    def do(report: ReportInputs, advance: Advance) -> None:
        write_evaluation(evaluate(evaluator, advance), report, output)
        evaluator.clean()

    return do


if __name__ == "__main__":
    sys.exit(main("evaluate", "Evaluate reconstruction, alignment and generation, and write the report.", work))
