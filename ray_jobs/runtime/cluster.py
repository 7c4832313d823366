"""Join the cluster that is there, or start Ray in this process."""

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

from ray_jobs.runtime.actor_pool import NOTHING, Share
from vavae.errors import UserError
from vavae.runs.config import RunConfig

TOKEN = Path("~/.ray/auth_token")
"""Where Ray keeps the token that it makes by itself."""
_LOCAL_OBJECT_STORE_BYTES = 200 * 1024**2
_KEEP_FREED_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(2 * 1024**3),
    "MALLOC_MMAP_THRESHOLD_": str(1024**3),
    "MALLOC_TOP_PAD_": str(256 * 1024**2),
}
"""For glibc: every step on a CPU allocates the same activations again, and fresh pages from the system are slow."""


@contextmanager
def cluster(config: RunConfig, cpus: float = 0, beside: Share = NOTHING) -> Iterator[None]:
    """Ray for the length of a job.

    Joins the cluster that `RAY_ADDRESS` or a surrounding `ray job submit` names. Otherwise starts Ray in this process,
    with as many CPUs as the workers ask for even where there are fewer, because a laptop's workers may share cores.

    Args:
        config: of the run.
        cpus: how many it shall have at least where it is started here.
        beside: what is taken besides the workers.

    Raises:
        UserError: the cluster can't hold the workers.
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
        _check_resources(config, beside)
    else:
        _stay_on_loopback()
        keep_token_private()
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, round(workers.count * workers.cpus + beside.cpus), math.ceil(cpus)),
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


def check_cluster(config: RunConfig, beside: Share) -> None:
    """Join the cluster of which a dry run speaks, where that can be done from here, to see whether it is large enough.

    Raises:
        UserError: it is not.
    """
    if not os.environ.get("RAY_ADDRESS", "http").startswith("http"):
        with cluster(config, beside=beside):
            pass


def _stay_on_loopback() -> None:
    """Nobody else has any business with a laptop's Ray, whose servers take the address of the node.

    Ray has a switch for nodes that are only ever alone, and the node's address is loopback then. It is read on import,
    and given on to Ray's processes by the environment.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def keep_token_private() -> None:
    """The token of a local Ray lets everybody in who has it, and Ray would leave it readable for everybody."""
    if any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")):
        return
    path = TOKEN.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(secrets.token_hex(32))
    path.chmod(0o600)


def _check_resources(config: RunConfig, beside: Share) -> None:
    """Refuse a cluster that can't hold the workers, and what runs beside them, rather than wait for ever."""
    workers, there = config.workers, ray.cluster_resources()
    field, count = ("count", workers.count) if workers.min_count is None else ("min_count", workers.min_count)
    of_workers = Share(count * workers.cpus, count * workers.gpus if workers.use_gpu else 0)
    kind, needed, extra = (
        ("GPU", of_workers.gpus, beside.gpus) if workers.use_gpu else ("CPU", of_workers.cpus, beside.cpus)
    )
    room = there.get(kind, 0)
    if room < needed + extra and not workers.wait_for_nodes:
        measures = "" if room < needed else f", train_lightningdit.measure beside them {extra:g}"
        remedy = f"lower workers.{field}" if room < needed else "set train_lightningdit.measure.when=after"
        raise UserError(
            f"workers.{field}={count} needs {needed:g} {kind}s{measures} and the cluster has {room:g}; "
            f"{remedy}, add nodes, or set workers.wait_for_nodes=true"
        )
