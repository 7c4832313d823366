"""Every job in a row, skipping what is there: ``python -m ray_jobs.pipeline --config FILE``."""

import sys
from collections.abc import Mapping
from importlib import import_module

import ray_jobs
from ray_jobs.runtime.command import JobFunction, pipeline
from vavae.runs.run import JOBS, Job, Run


def _function_of(job: Job) -> JobFunction:
    """The function of a job, which imports its module (torch, Ray Train) when it is called: a done one needs none."""

    def work(run: Run) -> None:
        import_module(f"{ray_jobs.__name__}.{job}").work(run)

    return work


JOB_FUNCTIONS: Mapping[Job, JobFunction] = {job: _function_of(job) for job in JOBS}

if __name__ == "__main__":
    sys.exit(pipeline("Run all jobs of a configuration, from images to report.", JOB_FUNCTIONS))
