"""A submission to Ray Jobs: its readable name, command, metadata for the dashboard, and environment."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import ray_jobs
from ray_jobs.submission.submittable import SWEEP
from vavae.config import digest
from vavae.config.credentials import REFUSAL, has_credentials
from vavae.config.load import load
from vavae.config.paths import written_path
from vavae.errors import UserError
from vavae.runs.commit import commit_of
from vavae.runs.config import RunConfig
from vavae.storage.config import StorageConfig
from vavae.sweep.sweep import Sweep, as_written

GRACE = "RAY_JOB_STOP_WAIT_TIME_S"
"""Environment variable of a job: seconds between stopping and killing it, for its last checkpoint."""
_GRACE_SECONDS = 600
_SECRET_NAME = re.compile(
    r"(^|_)(secrets?|tokens?|passw(or)?d|passphrase|credentials?|(api|access|private)?key(_id)?)(_(?!file|path)|$)",
    re.IGNORECASE,
)
_SECRET_CHARACTERS = 8
"""A shorter value of a variable could be any word."""


@dataclass(frozen=True)
class Subject:
    """The run or sweep of a job."""

    name: str
    storage: StorageConfig
    root_key: str
    """Key of `storage.root` in the configuration."""
    digest: str
    """Digest of the configuration."""

    @staticmethod
    def load(job: str, path: str, overrides: Sequence[str]) -> "Subject":
        """Read the configuration of a job; raises UserError where it is not valid."""
        if job == SWEEP:
            sweep = Sweep.load(path, overrides)
            return Subject(sweep.config.name, sweep.storage_config, "run.storage.root", digest(as_written(sweep)))
        config = load(RunConfig, path, overrides)
        return Subject(config.name, config.storage, "storage.root", digest(config))


@dataclass(frozen=True)
class Submission:
    """One job for Ray Jobs. Whoever sees the dashboard can read all of it."""

    id: str
    entrypoint: str
    metadata: Mapping[str, str]
    runtime_env: Mapping[str, Any]


def describe(
    job: str,
    subject: Subject,
    arguments: Sequence[str],
    working_dir: Path,
    variables: Mapping[str, str],
    pip: Sequence[str],
    now: datetime,
) -> Submission:
    """Make the submission of a job.

    Args:
        job: name of the job.
        subject: the run or sweep that its arguments name.
        arguments: of the job's command line, as the job will see them in the working directory.
        working_dir: the folder that is uploaded.
        variables: environment of the job and its workers.
        pip: requirements that are installed for this job.
        now: the time, which makes the name unique.
    """
    root = written_path(subject.storage.root)
    metadata = {"job": job, "run": subject.name, "storage": root, "config": subject.digest}
    commit = commit_of(working_dir)
    if commit is not None:
        metadata["commit"] = commit
    environment: dict[str, Any] = {"env_vars": {GRACE: str(_GRACE_SECONDS), **variables}}
    if pip:
        environment["pip"] = list(pip)
    return Submission(
        id=f"{subject.name}-{job}-{now:%Y%m%d-%H%M%S}",
        entrypoint=shlex.join(["python", "-m", f"{ray_jobs.__name__}.{job}", *arguments]),
        metadata=metadata,
        runtime_env=environment,
    )


def variables_of(asked: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Parse the variables of a job: `NAME=value`, or `NAME` for its value here.

    Args:
        asked: the items of `--env`.
        environment: of this process.

    Raises:
        UserError: one is not set here, is a secret by its name, or is set by the job itself.
    """
    variables = {}
    for item in asked:
        name, given, value = item.partition("=")
        if _SECRET_NAME.search(name):
            raise UserError(
                f"--env {name}: looks like a secret, and whoever sees the dashboard can read the environment of a job; "
                "give it to the machines of the cluster (role, profile, Kubernetes secret)"
            )
        if name == "OMP_NUM_THREADS":
            raise UserError(f"--env {name}: the job sets it itself; use workers.threads")
        if not given and name not in environment:
            raise UserError(f"--env {name}: not set here; give --env {name}=value")
        variables[name] = value if given else environment[name]
    return variables


def refuse_secrets(submission: Submission, environment: Mapping[str, str]) -> None:
    """Refuse a submission with a URL with credentials, or the value of a variable that is named like a secret.

    Args:
        submission: to be sent.
        environment: of this process.

    Raises:
        UserError: it holds one; the message names the variable and does not repeat the value.
    """
    words = [*shlex.split(submission.entrypoint), *submission.metadata.values()]
    words += [*submission.runtime_env["env_vars"].values(), *submission.runtime_env.get("pip", ())]
    if any(map(has_credentials, words)):
        raise UserError(f"the submission holds {REFUSAL}")
    text = json.dumps(words, ensure_ascii=False)
    for name, value in environment.items():
        if _SECRET_NAME.search(name) and len(value) >= _SECRET_CHARACTERS and value in text:
            raise UserError(f"the submission holds the value of {name}, and would show it to everybody: take it out")
