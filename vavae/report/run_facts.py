"""Facts about a run besides its metrics: its data and models, and the time and cost of its trainings."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from itertools import pairwise
from typing import Any

from vavae.config import describe_size, written_path
from vavae.evaluation.convergence import not_reached
from vavae.progress import clock
from vavae.runs.config import RunConfig
from vavae.runs.evaluation_inputs import ReportInputs
from vavae.runs.events import read_events
from vavae.runs.jobs import JOBS, Job
from vavae.runs.training_config import TrainingConfig
from vavae.storage.storage import Storage
from vavae.tracking.trackers import TRACKING, links
from vavae.training.checkpoints.metrics import CheckpointMetrics
from vavae.training.hardware import HARDWARE, Hardware

_HOUR = 3600


def run_summary(config: RunConfig) -> str:
    """Data and models of a run, in one line."""
    tokenizer, transformer = config.tokenizer, config.lightningdit
    size = transformer.size or f"{transformer.depth} x {transformer.width}"
    return (
        f"{written_path(config.shards.source)} at {describe_size(config.shards.image_size)} px; "
        f"tokenizer f{tokenizer.downsample}d{tokenizer.latent_dim}; LightningDiT {size}, patch {transformer.patch_size}"
    )


def run_byline(storage: Storage) -> str:
    """When a run was last at work, with the commit of its code and the time of its jobs, as far as its events tell.

    Args:
        storage: folder of the run.
    """
    events = read_events(storage)
    if not events:
        return f"written {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    parts = [f"{datetime.fromisoformat(events[-1]['time']):%Y-%m-%d %H:%M} UTC"]
    commits = [event["commit"] for event in events if "commit" in event]
    if commits:
        commit, _, dirty = commits[-1].partition("-")
        parts.append(f"commit {commit[:12]}{' with changes' if dirty else ''}")
    seconds = _seconds_at_work(events)
    return " · ".join([*parts, *([f"jobs took {clock(seconds)}"] if seconds >= 1 else [])])


def _seconds_at_work(events: Sequence[Mapping[str, Any]]) -> float:
    """Time of all attempts of jobs, each from its begin to the last event of it that is known, seconds."""
    attempts: list[list[datetime]] = []
    newest: dict[str, list[datetime]] = {}
    for event in events:
        stage, moment = event.get("stage", ""), datetime.fromisoformat(event["time"])
        if event["event"] == "stage_begun":
            newest[stage] = []
            attempts.append(newest[stage])
        if stage in newest:
            newest[stage].append(moment)
    return sum((attempt[-1] - attempt[0]).total_seconds() for attempt in attempts)


def run_facts(inputs: ReportInputs, rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Place of a run, digests of its artifacts, and length and cost of its trainings, by name.

    Args:
        inputs: those of a run, finished or not.
        rows: rows of its log.
    """
    facts = {"storage": inputs.storage.url()}
    rows = list(rows)
    for job, spec in JOBS.items():
        own = [row for row in rows if row["stage"] == job]
        if job in inputs.trainings and own:
            facts[f"training of the {spec.makes}"] = _training_fact(inputs, job, own)
            if job == "train_lightningdit":
                checkpoints = CheckpointMetrics.of(inputs.trainings[job], inputs.config.train_lightningdit)
                if checkpoints is not None:
                    facts["measured checkpoints"] = checkpoints.summary()
                    facts |= not_reached(checkpoints.found(), inputs.config.evaluate.frechet_thresholds)
            for tracker, link in links(inputs.trainings[job].child(TRACKING)).items():
                facts[f"training of the {spec.makes} in {tracker}"] = link
        if job in inputs.artifacts:
            facts[spec.makes] = inputs.artifacts[job].digest[:12]
    for tracker, link in links(inputs.tracked.records).items():
        facts[f"evaluation in {tracker}"] = link
    return facts


def hardware_of(training: Storage) -> Hardware | None:
    """The hardware of a training, given its folder; None before it has begun."""
    return Hardware.model_validate(training.read_json(HARDWARE)) if training.is_file(HARDWARE) else None


def training_seconds(rows: Iterable[Mapping[str, Any]]) -> float:
    """Time of the steps behind the rows of one training, seconds; starts and lost steps are not in the log."""
    timed = [row for row in rows if row.get("images_per_second")]
    before = [0, *(row["images"] for row in timed)]
    return sum(
        (images - previous) / row["images_per_second"]
        for (previous, images), row in zip(pairwise(before), timed, strict=True)
    )


def training_cost(rows: Iterable[Mapping[str, Any]], workers: int, hourly_price: float) -> float:
    """Cost of the steps behind the rows of one training, at a price per worker and hour."""
    return training_seconds(rows) / _HOUR * workers * hourly_price


def _training_fact(inputs: ReportInputs, job: Job, rows: list[Mapping[str, Any]]) -> str:
    config: TrainingConfig = getattr(inputs.config, job)
    seconds, images, budget = training_seconds(rows), rows[-1]["images"], config.steps * config.batch_size
    of = f" of {budget:,}" if images < budget else ""
    parts = [f"{images:,}{of} images in {clock(seconds)}"]
    if seconds:
        parts.append(f"{images / seconds:,.4g} images/s")
    hardware = hardware_of(inputs.trainings[job])
    if hardware is not None:
        parts.append(str(hardware))
        price = inputs.config.workers.hourly_price
        if price is not None:
            cost = training_cost(rows, hardware.workers, price)
            parts.append(f"cost {cost:,.2f} at {price:g} per worker and hour")
    return "; ".join(parts)
