"""Every job in a row, skipping what is there: ``python -m ray_jobs.pipeline --config FILE``."""

import sys
from collections.abc import Mapping
from importlib import import_module

from ray_jobs.runtime.command import JobFunction, pipeline
from vavae.runs.run import JOBS, Job


def _function_of(job: Job) -> JobFunction:
    """The function of a job, which imports its module (torch, Ray Train) when it is called: a done one needs none."""
    return lambda run: import_module(f"ray_jobs.{job}").work(run)


JOB_FUNCTIONS: Mapping[Job, JobFunction] = {job: _function_of(job) for job in JOBS}

if __name__ == "__main__":
    sys.exit(pipeline("Run all jobs of a configuration, from images to report.", JOB_FUNCTIONS))
