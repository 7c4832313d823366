"""A plan as tables on a terminal."""

import sys
from collections.abc import Sequence

from rich import filesize
from rich.console import Console
from rich.table import Table

from vavae.planning.offer import Offer
from vavae.planning.stages import JobEstimate
from vavae.progress import clock

_WIDTH = 118


def print_table(stages: Sequence[JobEstimate], offer: Offer) -> None:
    """Print a column for each stage, and the sum."""
    table = Table(title=f"{offer.count} x {offer.gpu_name} in {offer.nodes} machines", title_justify="left")
    for column in ("", *(stage.job for stage in stages)):
        table.add_column(column, justify="right" if column else "left")
    for rows in (_work, _limits, _checkpoints, _memory):
        columns = [rows(stage, offer) for stage in stages]
        for name in dict.fromkeys(name for column in sorted(columns, key=len, reverse=True) for name in column):
            table.add_row(name, *(column.get(name, "") for column in columns))
        table.add_section()
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH).print(table)
    hours = sum(stage.hours for stage in stages)
    price = "" if offer.price is None else f", {_price(hours, offer)}"
    print(f"in all {_hours(hours)} of {offer.count} GPUs{price}; evaluate is not counted")
    if any(stage.arithmetic == "fp32" for stage in stages):
        print(
            f"workers.tf32=true would compute what is in fp32 up to {offer.gpu.tf32 / offer.gpu.fp32:.1f} times as fast"
        )


def _work(stage: JobEstimate, offer: Offer) -> dict[str, str]:
    rows = {"images": f"{stage.images:,}"}
    if stage.steps is not None:
        rows["steps"] = f"{stage.steps:,}"
    if stage.arithmetic is not None:
        rows["GFLOP per image"] = f"{stage.flops / 1e9:{',.0f' if stage.flops > 1e10 else '.2g'}}"
        rows["arithmetic"] = stage.arithmetic
    rows |= {
        "expected images/s": f"{stage.images_per_second:,.0f}",
        "bound by": stage.bottleneck,
        "time": _hours(stage.hours),
    }
    if offer.price is not None:
        rows["cost"] = _price(stage.hours, offer)
    rows["writes"] = _bytes(stage.bytes_written)
    if stage.bytes_read:
        rows["reads/s of a machine"] = _bytes(stage.bytes_read * stage.images_per_second / offer.nodes)
    return rows


def _limits(stage: JobEstimate, _: Offer) -> dict[str, str]:
    """What would be the rate if there were only one limit."""
    return {f"images/s of {name}": f"{rate:,.0f}" for name, rate in stage.rates.items()}


def _checkpoints(stage: JobEstimate, _: Offer) -> dict[str, str]:
    if stage.safety is None:
        return {}
    safety = stage.safety
    return {
        "trained weights": f"{safety.parameters / 1e6:,.1f} M",
        "checkpoint": _bytes(safety.checkpoint),
        "copied in": f"{safety.stall_seconds:.3f} s",
        "uploaded in": f"{safety.upload_seconds:.2f} s",
        "best every": clock(safety.advised_seconds),
        "in images": f"{safety.advised_seconds * stage.images_per_second:,.0f}",
        "as configured every": clock(safety.configured_seconds),
        "which loses": f"{safety.lost:.2%}",
    }


def _memory(stage: JobEstimate, offer: Offer) -> dict[str, str]:
    """Of one GPU."""
    if stage.safety is None:
        return {}
    rows = {"activations of a slice": _bytes(stage.safety.activations)}
    for zero, count in enumerate(stage.safety.memory):
        too_much = "too much: " if count > offer.gpu.memory_bytes else ""
        rows[f"memory in ZeRO stage {zero}"] = f"{too_much}{_bytes(count)}"
    return rows


def _bytes(count: float) -> str:
    return filesize.decimal(round(count))


def _hours(hours: float) -> str:
    return clock(hours * 3600)


def _price(hours: float, offer: Offer) -> str:
    assert offer.price is not None, "an offer without a price"
    return f"{hours * offer.count * offer.price:,.2f}"
