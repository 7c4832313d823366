"""Join the existing Ray cluster, or start Ray in this process."""

import logging
import math
import os
import secrets
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import ray
from ray._common.utils import get_default_system_temp_dir
from ray._private import ray_constants
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address

from ray_jobs.runtime.resources import NO_RESOURCES, Resources
from vavae.command import interrupted_by_sigterm
from vavae.errors import UserError
from vavae.runs.config import RunConfig
from vavae.storage.scratch import SHORT_FOLDER, holds_sockets

TOKEN = Path("~/.ray/auth_token")
"""File of the token that Ray makes by itself."""
_LOCAL_OBJECT_STORE_BYTES = 200 * 1024**2
_KEEP_FREED_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(2 * 1024**3),
    "MALLOC_MMAP_THRESHOLD_": str(1024**3),
    "MALLOC_TOP_PAD_": str(256 * 1024**2),
}
"""Settings of glibc: every step on a CPU allocates the same activations again, and fresh pages are slow."""
_WARNINGS = "ignore::DeprecationWarning,ignore::FutureWarning"
"""Filter for warnings of Ray and torch about themselves, which no user can mend; `PYTHONWARNINGS` replaces it."""
_SOCKET_NAME_BYTES = 24
"""Longest name that Ray gives to a socket."""
_CONNECT_SECONDS, _ANSWER_SECONDS = 10.0, 10.0


@contextmanager
def cluster(config: RunConfig, cpus: float = 0, evaluation: Resources = NO_RESOURCES) -> Iterator[None]:
    """Connect to Ray for the length of the block.

    Joins the cluster that `RAY_ADDRESS` or a surrounding `ray job submit` names. Otherwise starts Ray in this process,
    with as many CPUs as the workers ask for even where there are fewer, because a laptop's workers may share cores.

    Args:
        config: of the run.
        cpus: lower limit for a cluster that is started here.
        evaluation: resources that evaluating checkpoints takes beside the workers.

    Raises:
        UserError: the cluster can't be joined, or can't hold them.
        KeyboardInterrupt: by SIGTERM, too.
    """
    if ray.is_initialized():
        yield
        return
    workers, address = config.workers, check_ray()
    quiet = {"PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", _WARNINGS)}
    environment = {"env_vars": {"OMP_NUM_THREADS": str(workers.threads), **_KEEP_FREED_MEMORY, **quiet}}
    print("starting Ray" if address is None else "joining the cluster", flush=True)
    # Without it the dashboard knows nothing of trainings, their workers and their logs.
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    with nullcontext() if address is not None else session_folder() as folder:
        try:
            if address is not None:
                ray.init(address, runtime_env=environment, logging_level=logging.WARNING)
                _check_resources(config, evaluation)
            else:
                _stay_on_loopback()
                # It warns that its token is asked for, which keep_token_private has seen to.
                logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
                cpus_of_run = round(workers.count * workers.cpus + evaluation.cpus)
                ray.init(
                    address="local",
                    num_cpus=max(os.cpu_count() or 1, cpus_of_run, math.ceil(cpus)),
                    include_dashboard=workers.dashboard,
                    object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
                    # Ray starts workers through a shell and leaves the quoting of the interpreter to us.
                    runtime_env={**environment, "py_executable": shlex.quote(sys.executable)},
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    _temp_dir=folder,
                )
            with interrupted_by_sigterm():  # Ray has put a handler of its own in place
                yield
        except SystemExit as exit:
            if exit.code == signal.SIGTERM:  # by that handler, while Ray was starting
                raise KeyboardInterrupt from None
            raise
        finally:
            ray.shutdown()


def check_ray() -> str | None:
    """Check that the cluster answers which `RAY_ADDRESS` names, or that Ray can be started here, before anything is.

    Returns:
        `HOST:PORT` of the cluster to join; None where Ray is to be started in this process, or runs in it.

    Raises:
        UserError: the address is none that a job can join, nothing answers there, or Ray's token can't be kept here.
    """
    if ray.is_initialized():
        return None
    named = os.environ.get("RAY_ADDRESS")
    if named in (None, "", "local"):
        keep_token_private()
        return None
    place, remedy = f"RAY_ADDRESS={named}", "give HOST:PORT of the cluster's head, or unset it to start Ray here"
    if "://" in named:
        kind = "the dashboard's, which vavae submit takes" if named.startswith("http") else "none that jobs can join"
        raise UserError(f"{place} is {kind}: {remedy} (the port is 6379 unless it was set)")
    try:
        address = canonicalize_bootstrap_address(named)
        parts = urlsplit(f"//{address}")
        if address is None or parts.hostname is None or parts.port is None:
            raise ValueError("no cluster runs here" if named == "auto" else "no address of a host and a port")
        socket.create_connection((parts.hostname, parts.port), _CONNECT_SECONDS).close()
        with init_grpc_channel(address, ray_constants.GLOBAL_GRPC_OPTIONS) as channel:
            grpc.channel_ready_future(channel).result(_ANSWER_SECONDS)
    except (OSError, ValueError, grpc.FutureTimeoutError) as error:
        reason = str(error).partition(". ")[0] or f"what listens is none, or did not answer in {_ANSWER_SECONDS:g} s"
        raise UserError(f"{place}: no Ray cluster answers there ({reason}); {remedy}") from error
    return address


def check_cluster(config: RunConfig, evaluation: Resources) -> None:
    """Check for a dry run that the cluster is large enough, where it can be joined from here.

    Args:
        config: of the run.
        evaluation: as for `cluster`.

    Raises:
        UserError: it is too small.
    """
    if os.environ.get("RAY_ADDRESS", "").partition("://")[0] not in ("", "local", "http", "https"):
        with cluster(config, evaluation=evaluation):
            pass


@contextmanager
def session_folder() -> Iterator[str]:
    """Yield a folder for the session of a local Ray, deleted afterwards.

    Ray opens the folder itself to every user of the machine, so it lies in one that is this user's alone: below Ray's
    temporary folder, or below a short one where the paths of sockets would be too long there.
    """
    session = f"session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}"
    parent = get_default_system_temp_dir()
    if not holds_sockets(os.path.join(parent, "ray-12345678", "ray", session, "sockets"), _SOCKET_NAME_BYTES):
        parent = SHORT_FOLDER
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ray-", dir=parent, ignore_cleanup_errors=True) as private:
        yield os.path.join(private, "ray")


def _stay_on_loopback() -> None:
    """Let the servers of a local Ray, which take the address of the node, listen on loopback alone.

    Ray has a switch for nodes that are only ever alone, and the node's address is loopback then. It is read on import,
    and given on to Ray's processes by the environment.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def keep_token_private() -> None:
    """Make the token of a local Ray before Ray does, which would leave it readable for everybody.

    Raises:
        UserError: it can't be written.
    """
    if any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")):
        return
    path = TOKEN.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(secrets.token_hex(32))
        path.chmod(0o600)
    except OSError as error:
        raise UserError(
            f"{path}: Ray's token can't be kept there ({error.strerror}); set HOME to a folder that can be written, or "
            "RAY_AUTH_TOKEN_PATH to a file with a token"
        ) from error


def _check_resources(config: RunConfig, evaluation: Resources) -> None:
    """Refuse a cluster that can't hold the workers and the evaluation beside them, rather than wait forever."""
    workers = config.workers
    field, count = ("count", workers.count) if workers.min_count is None else ("min_count", workers.min_count)
    of_workers = Resources(count * workers.cpus, count * workers.gpus if workers.use_gpu else 0)
    kind, needed, extra = (
        ("GPU", of_workers.gpus, evaluation.gpus) if workers.use_gpu else ("CPU", of_workers.cpus, evaluation.cpus)
    )
    available = ray.cluster_resources().get(kind, 0)
    if available < needed + extra and not workers.wait_for_nodes:
        beside = "" if available < needed else f", train_lightningdit.measure beside them {extra:g}"
        remedy = f"lower workers.{field}" if available < needed else "set train_lightningdit.measure.when=after"
        raise UserError(
            f"workers.{field}={count} needs {needed:g} {kind}s{beside} and the cluster has {available:g}; "
            f"{remedy}, add nodes, or set workers.wait_for_nodes=true"
        )
