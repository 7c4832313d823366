"""Every job in a row, skipping what is there: ``python -m ray_jobs.pipeline --config FILE``."""

import sys
from collections.abc import Mapping
from importlib import import_module

from ray_jobs.runtime.command import JobFunction, pipeline
from vavae.runs.jobs import JOBS, Job

# A job's module (torch, Ray Train) is imported when the job runs: a run that is done needs none.
JOB_FUNCTIONS: Mapping[Job, JobFunction] = {
    job: lambda run, job=job: import_module(f"ray_jobs.{job}").work(run)  # type: ignore[misc]
    for job in JOBS
}

if __name__ == "__main__":
    sys.exit(pipeline("Run all jobs of a configuration, from images to report.", JOB_FUNCTIONS))
