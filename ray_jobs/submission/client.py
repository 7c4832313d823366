"""Client of a cluster: its jobs, their logs, and stopping them."""

import asyncio
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from ray_jobs.runtime.cluster import TOKEN, check_ray
from ray_jobs.submission.submission import GRACE, Submission
from vavae.command import INTERRUPTED
from vavae.errors import UserError

_POLL_SECONDS, _RETRY_SECONDS, _PATIENCE_SECONDS = 0.5, 1.0, 300.0
_ANSWER_SECONDS = 10.0
_OUTAGE = (RuntimeError, OSError, aiohttp.ClientError)


class Cluster:
    """The cluster that `RAY_ADDRESS` names (`http://HEAD:8265`), or the one on this machine.

    The token comes from `RAY_AUTH_TOKEN`, the file `RAY_AUTH_TOKEN_PATH`, or Ray's own file.

    Args:
        client: of Ray Jobs; None connects one.

    Raises:
        UserError: nothing answers there, the token is refused, or others can read its file.
    """

    def __init__(self, client: JobSubmissionClient | None = None) -> None:
        self._client = _connect() if client is None else client

    @property
    def address(self) -> str:
        """Address of the dashboard."""
        return self._client.get_address()

    def submit(self, submission: Submission, working_dir: Path) -> None:
        """Upload the working directory, unless the cluster has it, and start the job."""
        with _user_errors():
            self._client.submit_job(
                submission_id=submission.id,
                entrypoint=submission.entrypoint,
                metadata=dict(submission.metadata),
                runtime_env={**submission.runtime_env, "working_dir": str(working_dir)},
            )

    def jobs(self) -> list[JobDetails]:
        """All submitted jobs, oldest first."""
        with _user_errors():
            found = [job for job in self._client.list_jobs() if job.type == JobType.SUBMISSION]
        return sorted(found, key=lambda job: job.start_time or 0)

    def job(self, name: str) -> JobDetails:
        """Details of a job; raises UserError where there is none of this name."""
        with _user_errors(f"{name}: no such job; vavae jobs lists them"):
            return self._client.get_job_info(name)

    def log(self, name: str) -> str:
        """Log of a job so far."""
        self.job(name)
        with _user_errors():
            return self._client.get_job_logs(name)

    def follow(self, name: str, show: Callable[[str], None]) -> JobDetails:
        """Show the log of a job until it has ended, through broken connections.

        Args:
            name: of the job.
            show: takes each new part of the log.

        Raises:
            UserError: the cluster could not be reached for minutes.
        """
        unseen, lost_at = _Unseen(show), None
        while True:
            try:
                asyncio.run(self._tail(name, unseen))
                job, lost_at = self._client.get_job_info(name), None
                if job.status.is_terminal():
                    return job
            except _OUTAGE as error:
                lost_at = time.monotonic() if lost_at is None else lost_at
                if time.monotonic() - lost_at > _PATIENCE_SECONDS:
                    reason = _in_short(error)
                    raise UserError(f"{name}: lost {self.address} ({reason}); vavae logs {name} --follow") from error
            time.sleep(_RETRY_SECONDS)

    async def _tail(self, name: str, unseen: "_Unseen") -> None:
        unseen.begin()
        async for text in self._client.tail_job_logs(name):
            unseen(text)

    def stop(self, name: str) -> bool:
        """Ask a job to save a checkpoint and stop, and wait for it; returns whether it stopped in time by itself."""
        grace = int((self.job(name).runtime_env or {}).get("env_vars", {}).get(GRACE, 3))
        start = time.monotonic()
        with _user_errors():
            self._client.stop_job(name)
        while not self.job(name).status.is_terminal():
            time.sleep(_POLL_SECONDS)
        return time.monotonic() - start < grace


class _Unseen:
    """Shows the new part of a log that every connection sends from its beginning.

    Args:
        show: takes the new text.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show, self._shown, self._at = show, 0, 0

    def begin(self) -> None:
        """Begin a connection."""
        self._at = 0

    def __call__(self, text: str) -> None:
        new = text[max(0, self._shown - self._at) :]
        self._at += len(text)
        if new:
            self._show(new)
            self._shown = self._at


def exit_status(job: JobDetails) -> int:
    """Exit status of a command that has waited for a job."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    return INTERRUPTED if job.status == JobStatus.STOPPED else job.driver_exit_code or 1


def _connect() -> JobSubmissionClient:
    _check_token_file()
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)  # of packages and ignored files, one by one
    named = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
    if "://" in named and not named.startswith("http"):
        raise UserError(f"RAY_ADDRESS={named}: jobs are submitted to the dashboard: give its address, http://HEAD:8265")
    with _user_errors():
        if named.startswith("http"):
            _check_answers(named)
        elif named:
            check_ray()
        return JobSubmissionClient()


def _check_answers(address: str) -> None:
    """Ask the dashboard for anything, for Ray's client would wait without an end; raises OSError without an answer."""
    try:
        urlopen(f"{address.rstrip('/')}/api/version", timeout=_ANSWER_SECONDS).close()
    except HTTPError as error:
        error.close()  # a refusal is an answer, too
    except HTTPException as error:
        raise OSError(f"what listens there does not speak HTTP: {type(error).__name__}") from error


def _check_token_file() -> None:
    """Refuse a token that others on this machine can read, as ssh refuses such keys."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", TOKEN)).expanduser()
    asked = "RAY_AUTH_TOKEN" not in os.environ and os.environ.get("RAY_AUTH_MODE") != "disabled"
    if asked and path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UserError(f"{path}: others on this machine can read the token; chmod 600 {path}")


@contextmanager
def _user_errors(otherwise: str | None = None) -> Iterator[None]:
    """Turn errors of Ray's client into a UserError.

    Args:
        otherwise: its text where the cluster answers that there is no such job.
    """
    named = [f"{name}={os.environ[name]}" for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ]
    place = named[0] if named else "no RAY_ADDRESS is set, and on this machine"
    try:
        yield
    except UserError:
        raise
    except AuthenticationError as error:
        raise UserError(f"{place}: {_in_short(error)}; see RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH") from error
    except OSError as error:
        raise UserError(f"{place}: no Ray dashboard answers ({_in_short(error)})") from error
    except (RuntimeError, ValueError) as error:
        raise UserError(otherwise if otherwise and "404" in str(error) else f"{place}: {_in_short(error)}") from error


def _in_short(error: Exception) -> str:
    """The first sentence of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
