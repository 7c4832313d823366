"""``vavae submit | jobs | logs | stop``. Ray is imported where a command runs, not where its options are described."""

import argparse
import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_jobs.submission.submittable import SUBMITTABLE
from vavae.errors import UserError
from vavae.progress import clock

if TYPE_CHECKING:
    from ray_jobs.submission.client import Cluster
    from ray_jobs.submission.submission import Submission


def add_commands(commands: Any) -> None:
    """Add the commands that need a cluster to ``vavae``; ``act`` of their arguments returns the exit status."""
    submit = commands.add_parser("submit", help="run a job on the cluster that RAY_ADDRESS names")
    submit.set_defaults(act=_submit)
    submit.add_argument("job", choices=SUBMITTABLE, metavar="JOB", help=", ".join(SUBMITTABLE))
    submit.add_argument("--config", required=True, metavar="FILE", help="the YAML configuration of the run or sweep")
    submit.add_argument("overrides", nargs="*", metavar="key.path=value", help="set one key, value in YAML")
    submit.add_argument("--follow", action="store_true", help="show the job's log and end with its status")
    submit.add_argument("--dry-run", action="store_true", help="check everything, say what would be submitted and exit")
    submit.add_argument(
        "--working-dir", type=Path, default=Path(), metavar="DIR", help="folder that is uploaded; default: this one"
    )
    submit.add_argument(
        "--env", action="append", default=[], metavar="NAME[=value]", help="a variable for the job; never a secret"
    )
    submit.add_argument(
        "--pip", action="append", default=[], metavar="REQUIREMENT", help="a package that the job installs first"
    )
    jobs = commands.add_parser("jobs", help="list the jobs of the cluster")
    jobs.set_defaults(act=_jobs)
    logs = commands.add_parser("logs", help="show what a job has printed")
    logs.set_defaults(act=_logs)
    logs.add_argument(
        "--follow", action="store_true", help="follow the log until the job ends, and end with its status"
    )
    stop = commands.add_parser("stop", help="let a job save a checkpoint and stop")
    stop.set_defaults(act=_stop)
    for command in (logs, stop):
        command.add_argument("name", metavar="NAME", help="as vavae submit and vavae jobs say it")


def _submit(arguments: argparse.Namespace) -> int:
    submission = _checked(arguments)
    if arguments.dry_run:
        return 0
    from ray_jobs.submission.client import Cluster

    cluster = Cluster()
    cluster.submit(submission, arguments.working_dir)
    print(f"submitted to {cluster.address}: {submission.id}", flush=True)
    return _follow(cluster, submission.id) if arguments.follow else 0


def _checked(arguments: argparse.Namespace) -> "Submission":
    """Describe and print the submission, after a dry run of the job."""
    from rich import filesize

    from ray_jobs.submission.submission import Subject, describe, refuse_secrets, variables_of
    from vavae.config.paths import written_path
    from vavae.storage.storage import Storage

    subject = Subject.load(arguments.job, arguments.config, arguments.overrides)
    storage, root = Storage.of(subject.storage), f"{subject.root_key}={written_path(subject.storage.root)}"
    if storage.is_local and not os.path.isabs(written_path(subject.storage.root)):
        raise UserError(
            f"{root} is relative, so on the cluster it would go with the job: give a "
            "folder that all its machines see, or an object store"
        )

    from ray_jobs.submission.upload import config_inside, dry_run, unpacked

    folder = arguments.working_dir
    words = ["--config", config_inside(arguments.config, folder), *arguments.overrides]
    variables = variables_of(arguments.env, os.environ)
    submission = describe(arguments.job, subject, words, folder, variables, arguments.pip, datetime.now())
    refuse_secrets(submission, os.environ)
    with unpacked(folder) as upload:
        if storage.is_local and not storage.exists():
            print(f"{root} is not on this machine: the job checks it on the cluster")
        else:
            dry_run(upload, arguments.job, words)
        print(f"upload: {upload.files:,} files of {folder.resolve()}, {filesize.decimal(upload.bytes)}")
    print(f"name: {submission.id}\ncommand: {submission.entrypoint}")
    for key, value in (("metadata", submission.metadata), ("environment", submission.runtime_env)):
        print(f"{key}: {json.dumps(value)}")
    return submission


def _follow(cluster: "Cluster", name: str) -> int:
    from ray_jobs.submission.client import exit_status

    try:
        job = cluster.follow(name, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(
            f"\n{name} keeps running: vavae logs {name} --follow shows it again, vavae stop {name} stops it",
            file=sys.stderr,
        )
        raise
    print(f"{name}: {job.status.value.lower()}")
    return exit_status(job)


def _jobs(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ray_jobs.submission.client import Cluster

    table = Table(box=None, pad_edge=False)
    for column in ("name", "state", "job", "run", "commit", "began", "took"):
        table.add_column(column)
    for job in Cluster().jobs():
        metadata = job.metadata or {}
        began = datetime.fromtimestamp((job.start_time or 0) / 1000)
        ended = datetime.fromtimestamp(job.end_time / 1000) if job.end_time else datetime.now()
        table.add_row(
            job.submission_id or "",
            job.status.value.lower(),
            metadata.get("job", ""),
            metadata.get("run", ""),
            metadata.get("commit", "")[:12],
            f"{began:%Y-%m-%d %H:%M}",
            clock((ended - began).total_seconds()),
        )
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from ray_jobs.submission.client import Cluster

    cluster = Cluster()
    if arguments.follow:
        cluster.job(arguments.name)
        return _follow(cluster, arguments.name)
    print(cluster.log(arguments.name), end="")
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    from ray_jobs.submission.client import Cluster

    cluster, name = Cluster(), arguments.name
    job = cluster.job(name)
    if job.status.is_terminal():
        print(f"{name} has ended before: {job.status.value.lower()}")
        return 0
    print(f"{name}: stopping after a checkpoint", flush=True)
    stopped = cluster.stop(name)
    how = "has stopped" if stopped else "did not stop in time and was killed, so its last checkpoint counts"
    print(f"{name} {how}; submitted again, the job resumes from its checkpoint")
    return 0
