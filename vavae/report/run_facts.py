"""What a reader of a report has to know of a run besides its figures: what was trained on what, for how long."""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from vavae.config import written_path
from vavae.progress import clock
from vavae.runs.config import RunConfig
from vavae.runs.run import JOBS, TRAININGS, Job, Run
from vavae.training.checkpoints.metrics import CheckpointMetrics
from vavae.training.hardware import HARDWARE, Hardware

_HOUR = 3600


def run_summary(config: RunConfig) -> str:
    """Data and models, in one line."""
    tokenizer, transformer = config.tokenizer, config.lightningdit
    size = transformer.size or f"{transformer.depth} x {transformer.width}"
    return (
        f"{written_path(config.shards.source)} at {config.shards.image_size} px; tokenizer f{tokenizer.downsample}"
        f"d{tokenizer.latent_dim}; LightningDiT {size}, patch {transformer.patch_size}"
    )


def run_facts(run: Run, rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Place, digests of all artifacts, and what the trainings took; by name.

    Args:
        run: finished or not.
        rows: of its log.
    """
    facts = {"storage": run.storage.url()}
    rows = list(rows)
    for job, stage in JOBS.items():
        if job in TRAININGS and (mine := [row for row in rows if row["stage"] == job]):
            facts[f"training of the {stage.makes}"] = _training(run, job, mine)
            if job == "train_lightningdit":
                measures = CheckpointMetrics.of(run.training_folder(job), run.config.train_lightningdit)
                if measures is not None:
                    facts["measured checkpoints"] = measures.summary()
        record = run.artifact(job)
        if record is not None:
            facts[stage.makes] = record.digest[:12]
    return facts


def hardware_of(run: Run, job: Job) -> Hardware | None:
    """What a training runs on, once it has begun."""
    place = f"{run.training_prefix(job)}/{HARDWARE}"
    return Hardware.model_validate(run.storage.read_json(place)) if run.storage.is_file(place) else None


def training_seconds(rows: Iterable[Mapping[str, Any]]) -> float:
    """Time of the steps behind the rows of one training; starts, and steps that were lost, are not in the log."""
    measured = [row for row in rows if row.get("images_per_second")]
    before = [0, *(row["images"] for row in measured)]
    return sum(
        (images - previous) / row["images_per_second"]
        for (previous, images), row in zip(pairwise(before), measured, strict=True)
    )


def training_cost(rows: Iterable[Mapping[str, Any]], workers: int, hourly_price: float) -> float:
    """What the steps behind the rows of one training cost, at a price per worker."""
    return training_seconds(rows) / _HOUR * workers * hourly_price


def _training(run: Run, job: Job, rows: list[Mapping[str, Any]]) -> str:
    seconds, images = training_seconds(rows), rows[-1]["images"]
    budget = run.budget(job)
    of = f" of {budget:,}" if budget is not None and images < budget else ""
    parts = [f"{images:,}{of} images in {clock(seconds)}"]
    if seconds:
        parts.append(f"{images / seconds:,.4g} images/s")
    hardware = hardware_of(run, job)
    if hardware is not None:
        parts.append(str(hardware))
        price = run.config.workers.hourly_price
        if price is not None:
            cost = training_cost(rows, hardware.workers, price)
            parts.append(f"cost {cost:,.2f} at {price:g} per worker and hour")
    return "; ".join(parts)
