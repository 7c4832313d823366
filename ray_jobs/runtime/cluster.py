"""Join the existing Ray cluster, or start Ray in this process."""

import logging
import math
import os
import secrets
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray
from ray._private import ray_constants

from ray_jobs.runtime.actor_pool import NO_RESOURCES, Resources
from vavae.errors import UserError
from vavae.runs.config import RunConfig

TOKEN = Path("~/.ray/auth_token")
"""File of the token that Ray makes by itself."""
_LOCAL_OBJECT_STORE_BYTES = 200 * 1024**2
_KEEP_FREED_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(2 * 1024**3),
    "MALLOC_MMAP_THRESHOLD_": str(1024**3),
    "MALLOC_TOP_PAD_": str(256 * 1024**2),
}
"""Settings of glibc: every step on a CPU allocates the same activations again, and fresh pages are slow."""


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
        UserError: the cluster can't hold them.
    """
    if ray.is_initialized():
        yield
        return
    workers = config.workers
    environment = {"env_vars": {"OMP_NUM_THREADS": str(workers.threads), **_KEEP_FREED_MEMORY}}
    print("joining the cluster" if "RAY_ADDRESS" in os.environ else "starting Ray", flush=True)
    # Without it the dashboard knows nothing of trainings, their workers and their logs.
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    if "RAY_ADDRESS" in os.environ:
        ray.init(runtime_env=environment, logging_level=logging.WARNING)
        _check_resources(config, evaluation)
    else:
        _stay_on_loopback()
        keep_token_private()
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, round(workers.count * workers.cpus + evaluation.cpus), math.ceil(cpus)),
            include_dashboard=workers.dashboard,
            object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
            # Ray starts workers through a shell and leaves the quoting of the interpreter to us.
            runtime_env={**environment, "py_executable": shlex.quote(sys.executable)},
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()


def check_cluster(config: RunConfig, evaluation: Resources) -> None:
    """Check for a dry run that the cluster is large enough, where it can be joined from here.

    Args:
        config: of the run.
        evaluation: as for `cluster`.

    Raises:
        UserError: it is too small.
    """
    if not os.environ.get("RAY_ADDRESS", "http").startswith("http"):
        with cluster(config, evaluation=evaluation):
            pass


def _stay_on_loopback() -> None:
    """Let the servers of a local Ray, which take the address of the node, listen on loopback alone.

    Ray has a switch for nodes that are only ever alone, and the node's address is loopback then. It is read on import,
    and given on to Ray's processes by the environment.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def keep_token_private() -> None:
    """Make the token of a local Ray before Ray does, which would leave it readable for everybody."""
    if any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")):
        return
    path = TOKEN.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(secrets.token_hex(32))
    path.chmod(0o600)


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
