"""A sweep of whole runs, up to the frontier: ``python -m ray_jobs.tune_vf --config configs/sweeps/FILE``."""

import sys
from collections.abc import Sequence

from ray_jobs.pipeline import JOB_FUNCTIONS
from ray_jobs.runtime.actor_pool import work_through
from ray_jobs.runtime.progress_actor import ProgressActor
from ray_jobs.tune import command
from ray_jobs.tune.shared_tasks import TaskFunctions
from vavae.evaluation import evaluate as evaluation
from vavae.runs.evaluation_inputs import EvaluationInputs
from vavae.runs.jobs import JOBS
from vavae.runs.run import Run
from vavae.sweep.trial import write_tokenizer_metrics


def evaluate_tokenizer(run: Run) -> None:
    """Evaluate the tokenizer of a run by itself, in one actor."""
    inputs = EvaluationInputs.of(run)

    def evaluate_and_keep(run: Run, progress: ProgressActor) -> None:
        metrics = evaluation.evaluate_tokenizer(inputs, progress.advance)
        write_tokenizer_metrics(run, {metric.name: metric.value for metric in metrics})

    work_through(run, "evaluate", lambda: evaluate_and_keep, [run], run.config.evaluate.images, actors=1)


TASK_FUNCTIONS: TaskFunctions = {
    **{job: JOB_FUNCTIONS[job] for job in JOBS},
    "evaluate_tokenizer": evaluate_tokenizer,
}


def main(argv: Sequence[str] | None = None, functions: TaskFunctions = TASK_FUNCTIONS) -> int:
    """Run the command line of a sweep; returns its exit status."""
    return command.main(functions, argv)


if __name__ == "__main__":
    sys.exit(main())
