"""Held-out images, exports and samples → metrics and report: ``python -m ray_jobs.evaluate --config FILE``."""

import sys
from functools import partial

from ray_jobs.runtime.actor_pool import Work, work_through
from ray_jobs.runtime.checkpoint_evaluation import evaluate_pending_checkpoints
from ray_jobs.runtime.command import main
from ray_jobs.runtime.progress_actor import ProgressActor
from vavae.evaluation.evaluate import evaluate
from vavae.evaluation.evaluator import Evaluator
from vavae.evaluation.parts import Part
from vavae.progress import Progress
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
        work_through(run, "evaluate", partial(_make_part, inputs), parts, images, actors)
        images = 0
    output.discard()
    report = ReportInputs.of(run)
    work_through(run, "evaluate", partial(_make_report, inputs, output), [report], images, actors=1)


def _make_part(inputs: EvaluationInputs) -> Work[Part, None]:
    evaluator = Evaluator(inputs)

    def do(part: Part, progress: ProgressActor) -> None:
        evaluator.evaluate(part, progress.advance)

    return do


def _make_report(inputs: EvaluationInputs, output: JobOutput) -> Work[ReportInputs, None]:
    evaluator = Evaluator(inputs)

    def do(report: ReportInputs, progress: ProgressActor) -> None:
        evaluation = evaluate(evaluator, progress.advance, progress.report)
        progress.report(Progress("evaluate", 0, None, doing="report"))
        write_evaluation(evaluation, report, output)
        evaluator.clean()

    return do


if __name__ == "__main__":
    sys.exit(main("evaluate", "Evaluate reconstruction, alignment and generation, and write the report.", work))
