"""Every job in a row, skipping what is there: ``python -m ray_jobs.pipeline --config FILE``."""

import sys
from collections.abc import Mapping

from ray_jobs import evaluate, precompute_latents, prepare_shards, sample, train_lightningdit, train_vavae
from ray_jobs.runtime.command import JobFunction, pipeline
from vavae.runs.jobs import Job

JOB_FUNCTIONS: Mapping[Job, JobFunction] = {
    "prepare_shards": prepare_shards.work,
    "train_vavae": train_vavae.work,
    "precompute_latents": precompute_latents.work,
    "train_lightningdit": train_lightningdit.work,
    "sample": sample.work,
    "evaluate": evaluate.work,
}

if __name__ == "__main__":
    sys.exit(pipeline("Run all jobs of a configuration, from images to report.", JOB_FUNCTIONS))
