"""The jobs that can be submitted."""

from vavae.runs.jobs import JOBS

SWEEP = "tune_vf"
"""The job whose configuration is a sweep file."""
SUBMITTABLE = (*JOBS, "pipeline", SWEEP)
"""Modules of `ray_jobs` with a command line."""
