"""A plan as a table on a terminal."""

import sys
from collections.abc import Sequence

from rich import filesize
from rich.console import Console
from rich.table import Table

from vavae.planning.cluster import ClusterSpec
from vavae.planning.jobs import JobEstimate
from vavae.progress import clock

_WIDTH = 118


def print_plan(jobs: Sequence[JobEstimate], cluster: ClusterSpec) -> None:
    """Print a column for each job, and the sum."""
    table = Table(title=f"{cluster.count} x {cluster.gpu_name} in {cluster.nodes} machines", title_justify="left")
    for column in ("", *(job.job for job in jobs)):
        table.add_column(column, justify="right" if column else "left")
    for rows in (_work, _limits, _checkpoints, _memory):
        columns = [rows(job, cluster) for job in jobs]
        for name in dict.fromkeys(name for column in sorted(columns, key=len, reverse=True) for name in column):
            table.add_row(name, *(column.get(name, "") for column in columns))
        table.add_section()
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH).print(table)
    hours = sum(job.hours for job in jobs)
    price = "" if cluster.price is None else f", {_price(hours, cluster)}"
    print(f"in all {_hours(hours)} of {cluster.count} GPUs{price}; evaluate is not counted")
    if any(job.arithmetic == "fp32" for job in jobs):
        speedup = cluster.gpu.tf32 / cluster.gpu.fp32
        print(f"workers.tf32=true would compute what is in fp32 up to {speedup:.1f} times as fast")


def _work(job: JobEstimate, cluster: ClusterSpec) -> dict[str, str]:
    rows = {"images": f"{job.images:,}"}
    if job.steps is not None:
        rows["steps"] = f"{job.steps:,}"
    if job.arithmetic is not None:
        rows["GFLOP per image"] = f"{job.flops / 1e9:{',.0f' if job.flops > 1e10 else '.2g'}}"
        rows["arithmetic"] = job.arithmetic
    if job.muon_flops:
        rows["GFLOP of Muon per step"] = f"{job.muon_flops / 1e9:,.0f}"
    rows |= {
        "expected images/s": f"{job.images_per_second:,.0f}",
        "bound by": job.bottleneck,
        "time": _hours(job.hours),
    }
    if cluster.price is not None:
        rows["cost"] = _price(job.hours, cluster)
    rows["writes"] = _bytes(job.bytes_written)
    if job.bytes_read:
        rows["reads/s of a machine"] = _bytes(job.bytes_read * job.images_per_second / cluster.nodes)
    if job.bytes_sent:
        rows["sent/step of a worker"] = _bytes(job.bytes_sent)
    return rows


def _limits(job: JobEstimate, _: ClusterSpec) -> dict[str, str]:
    """Rates with only one limit each."""
    return {f"images/s of {name}": f"{rate:,.0f}" for name, rate in job.rates.items()}


def _checkpoints(job: JobEstimate, _: ClusterSpec) -> dict[str, str]:
    if job.training is None:
        return {}
    training = job.training
    return {
        "trained weights": f"{training.parameters / 1e6:,.1f} M",
        "checkpoint": _bytes(training.checkpoint),
        "copied in": f"{training.stall_seconds:.3f} s",
        "uploaded in": f"{training.upload_seconds:.2f} s",
        "best every": clock(training.advised_seconds),
        "in images": f"{training.advised_seconds * job.images_per_second:,.0f}",
        "as configured every": clock(training.configured_seconds),
        "which loses": f"{training.lost:.2%}",
    }


def _memory(job: JobEstimate, cluster: ClusterSpec) -> dict[str, str]:
    """Memory of one GPU in every ZeRO stage."""
    if job.training is None:
        return {}
    rows = {"activations of a pass": _bytes(job.training.activations)}
    for zero_stage, bytes_held in enumerate(job.training.memory):
        too_much = "too much: " if bytes_held > cluster.gpu.memory_bytes else ""
        rows[f"memory in ZeRO stage {zero_stage}"] = f"{too_much}{_bytes(bytes_held)}"
    return rows


def _bytes(count: float) -> str:
    return filesize.decimal(round(count))


def _hours(hours: float) -> str:
    return clock(hours * 3600)


def _price(hours: float, cluster: ClusterSpec) -> str:
    assert cluster.price is not None, "a cluster without a price"
    return f"{hours * cluster.count * cluster.price:,.2f}"
